"""A note on the progress bar during a long measurement, and a line about the first one."""

import time
from collections.abc import Callable

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

from lightning_curvature.reporting.loggers import inform

# A measurement that takes longer than this is announced.
_PATIENCE_SECONDS = 3.0


class Progress:
    """Shows a long measurement on the Trainer's progress bar, if it is one of Lightning's, with a count of ``unit``."""

    def __init__(
        self, trainer: pl.Trainer, name: str, clock: Callable[[], float] = time.monotonic, unit: str = "products"
    ) -> None:
        self._name, self._unit, self._clock, self._start, self._count = name, unit, clock, clock(), 0
        self._last = self._start
        self._show = _shower(trainer.progress_bar_callback) if trainer.is_global_zero else None

    def tick(self) -> None:
        """Count one item, and show the count once a second."""
        self._count += 1
        now = self._clock()
        if self._show is not None and now - self._start >= _PATIENCE_SECONDS and now - self._last >= 1.0:
            self._last = now
            self._show(f"{self._name}: {self._count} {self._unit}, {now - self._start:.0f} s")

    def close(self) -> None:
        """Remove the note."""
        if self._show is not None and self._last > self._start:
            self._show(None)

    def tell(self) -> None:
        """Log how long the measurement took if it was long, also for users without a progress bar."""
        seconds = self._clock() - self._start
        if seconds >= _PATIENCE_SECONDS:
            inform(f"{self._name}: the first measurement took {self._count} {self._unit}, {seconds:.0f} s.")


def _shower(bar: object) -> Callable[[str | None], None] | None:
    """Return a function that writes a note onto a progress bar, and restores its text when called with None."""
    if isinstance(bar, TQDMProgressBar):
        line = bar.train_progress_bar
        before = line.desc
        return lambda note: line.set_description_str(note or before, refresh=True)
    if isinstance(bar, RichProgressBar) and bar.progress is not None and bar.train_progress_bar_id is not None:
        progress, task = bar.progress, bar.train_progress_bar_id
        description = progress.tasks[progress.task_ids.index(task)].description
        return lambda note: progress.update(task, description=note or description, refresh=True)
    return None
