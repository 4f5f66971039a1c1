"""A note on the progress bar while a long measurement is under way, and a line about the first one."""

import time
from collections.abc import Callable

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

from lightning_curvature.reporting.loggers import inform

# A measurement says on the progress bar that it is under way when it has taken this long.
_PATIENCE_SECONDS = 3.0


class Progress:
    """Shows a measurement that takes its time on the progress bar, and takes the note off when it is over.

    Args:
        trainer: its progress bar is written to; Lightning's own are known, others show nothing.
        name: what is under way.
        clock: seconds.
        unit: what is counted.
    """

    def __init__(
        self, trainer: pl.Trainer, name: str, clock: Callable[[], float] = time.monotonic, unit: str = "products"
    ) -> None:
        self._name, self._unit, self._clock, self._start, self._count = name, unit, clock, clock(), 0
        self._last = self._start
        self._show = _shower(trainer.progress_bar_callback) if trainer.is_global_zero else None

    def tick(self) -> None:
        """Count one product, or whatever is counted."""
        self._count += 1
        now = self._clock()
        # Once a second is enough to see that it moves.
        if self._show is not None and now - self._start >= _PATIENCE_SECONDS and now - self._last >= 1.0:
            self._last = now
            self._show(f"{self._name}: {self._count} {self._unit}, {now - self._start:.0f} s")

    def close(self) -> None:
        """Take the note off."""
        if self._show is not None and self._last > self._start:
            self._show(None)

    def tell(self) -> None:
        """Say how long it took, where it took its time: also to who has no progress bar."""
        seconds = self._clock() - self._start
        if seconds >= _PATIENCE_SECONDS:
            inform(f"{self._name}: the first measurement took {self._count} {self._unit}, {seconds:.0f} s.")


def _shower(bar: object) -> Callable[[str | None], None] | None:
    """Return what writes a note onto a progress bar, and with None puts back what was there."""
    if isinstance(bar, TQDMProgressBar):
        line = bar.train_progress_bar
        before = line.desc
        return lambda note: line.set_description_str(note or before, refresh=True)
    if isinstance(bar, RichProgressBar) and bar.progress is not None and bar.train_progress_bar_id is not None:
        progress, task = bar.progress, bar.train_progress_bar_id
        said = progress.tasks[progress.task_ids.index(task)].description
        return lambda note: progress.update(task, description=note or said, refresh=True)
    return None
