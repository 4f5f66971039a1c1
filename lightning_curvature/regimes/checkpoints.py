"""The checkpoints of quiet steps, of which the last one from before an alarm is kept."""

import os
from typing import Any

import lightning.pytorch as pl


class QuietCheckpoints:
    """Saves the run at quiet steps; each file replaces the one before it, but for that from before the last alarm.

    Every rank calls all methods at the same steps.

    Attributes:
        newest: path of the last one saved since the last alarm, or None.
        kept: path of the one from before the last alarm, or None.
        step: at which the newest was saved.
    """

    def __init__(self, dirpath: str, name: str, every: int) -> None:
        self._dirpath, self._name, self._every = dirpath, name, every
        self.newest: str | None = None
        self.kept: str | None = None
        self.step = -1

    @property
    def last_good(self) -> str | None:
        """The one from before the last alarm; the newest where there was no alarm."""
        return self.kept or self.newest

    def save_when_due(self, trainer: pl.Trainer) -> None:
        """Save the run as it is, where the last time is long enough ago."""
        step = trainer.global_step
        if self.step >= 0 and step - self.step < self._every:
            return
        before, self.step = self.newest, step
        self.newest = os.path.join(self._dirpath, f"{self._name}-step={step}.ckpt")
        trainer.save_checkpoint(self.newest)
        self._remove(trainer, before)

    def keep(self, trainer: pl.Trainer) -> str | None:
        """Keep the newest from now on, and return its path; without one keep what was kept before."""
        if self.newest is not None:
            before, self.kept, self.newest, self.step = self.kept, self.newest, None, -1
            self._remove(trainer, before)
        return self.kept

    def _remove(self, trainer: pl.Trainer, path: str | None) -> None:
        if path is not None and path not in (self.newest, self.kept):
            trainer.strategy.remove_checkpoint(path)

    def state_dict(self) -> dict[str, Any]:
        """Return where the files are."""
        return {"newest": self.newest, "kept": self.kept, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up files that a resumed run goes on to replace."""
        self.newest, self.kept, self.step = state["newest"], state["kept"], state["step"]
