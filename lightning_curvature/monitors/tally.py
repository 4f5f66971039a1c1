"""Counts the measurements of a fit that were due and made, and says at its end why there is none."""

import math
from collections.abc import Iterable

import lightning.pytorch as pl

from lightning_curvature.reporting.loggers import warn

_UNSEEN = (
    "no step that was due came through Lightning with a loss; step by self.optimizers(), and return losses from "
    "training_step."
)


class Tally:
    """The measurements of one fit."""

    def __init__(self) -> None:
        self.due = self.made = 0
        self._first: tuple[int, int] | None = None  # optimizer steps and batches before the first batch
        self._last_due = -1
        self._failed, self._reason = False, ""
        self._error: Exception | None = None

    def ask(self, trainer: pl.Trainer, is_due: bool) -> None:
        """Count the step that a batch begins, once, where it is due."""
        step = trainer.global_step
        self._first = self._first or (step, trainer.fit_loop.epoch_loop.total_batch_idx)
        if is_due and step != self._last_due:
            self._last_due, self.due = step, self.due + 1

    def fail(self, error: Exception) -> None:
        """Note why a measurement has failed, or a part of it."""
        self._failed, self._reason = True, f"{type(error).__name__}: {error}".splitlines()[0]
        self._error = error

    def measured(self, values: Iterable[float]) -> None:
        """Count a measurement as made, unless it failed and gave no number at all."""
        self.made += not self._failed or any(map(math.isfinite, values))
        self._failed = False

    def raise_if_lost(self) -> None:
        """Raise the last failure where no measurement was made."""
        if self._error is not None and not self.made:
            raise self._error

    def tell(self, monitor: str, trainer: pl.Trainer) -> None:
        """Warn where Lightning has counted no optimizer step, by which all monitors go, or where all was lost."""
        step, batch = self._first or (-1, 0)
        batches = trainer.fit_loop.epoch_loop.total_batch_idx + 1 - batch
        if step == trainer.global_step and batches >= trainer.accumulate_grad_batches:
            warn(
                f"{monitor} must find optimizer steps that Lightning counts, got none in {batches} batches, and made "
                f"{self.made} of {self.due} measurements that were due: step by self.optimizers().step(), not by the "
                "step of the optimizer within."
            )
        elif not self.made and self.due > bool(self._reason):  # of a single one that failed, all has been said
            warn(
                f"{monitor} must make the measurements that are due, got 0 of {self.due}: "
                f"{(self._reason or _UNSEEN).rstrip('.')}."
            )
