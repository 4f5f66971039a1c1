"""Where numbers go: loggers, ``callback_metrics``, the progress bar, TensorBoard's layout.

The only home of private Trainer attributes.
"""

import math
import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

# TensorBoard keeps one layout a run: it is written once for all the monitors of a Trainer.
_laid_out: "weakref.WeakSet[Logger]" = weakref.WeakSet()

LAYOUT_TITLE = "Curvature"


class CurvatureWarning(UserWarning):
    """A measurement that could not be made, or cannot be trusted."""


@runtime_checkable
class HasCharts(Protocol):
    """A monitor that proposes TensorBoard charts."""

    def charts(self) -> dict[str, list[str]]:
        """Return title → keys drawn together."""
        ...


def warn(message: str, any_rank: bool = False) -> None:
    """Warn once a process for each distinct message (Python's own registry of warnings sees to that).

    On rank 0 only, unless ``any_rank``: what is wrong on one rank is to be seen from there.
    """
    if any_rank:
        warnings.warn(message, category=CurvatureWarning, stacklevel=3)
    else:
        rank_zero_warn(message, category=CurvatureWarning, stacklevel=4)


def inform(message: str) -> None:
    """Say what is no reason to worry, on rank 0, through Lightning's logger."""
    rank_zero_info(message)


def report(trainer: pl.Trainer, values: Mapping[str, float], progress_bar: Sequence[str] = ()) -> None:
    """Write values to every logger at the step Lightning logs at, and make them watchable.

    ``trainer.callback_metrics`` keeps the last finite value of a key: EarlyStopping takes a NaN for the end of
    training, and a single step that went uphill is not. The loggers get what was measured.
    """
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step=logged_step(trainer))
    for key, value in values.items():
        if math.isfinite(value) or key not in trainer.callback_metrics:
            # The properties hand out the connector's own dicts, as LearningRateMonitor relies on too.
            tensor = torch.tensor(value, dtype=torch.float32, device=trainer.strategy.root_device)
            trainer.callback_metrics[key] = tensor
    trainer.progress_bar_metrics.update({key: values[key] for key in progress_bar if key in values})


def add_layout(trainer: pl.Trainer) -> None:
    """Give TensorBoard the custom layout of all monitors of this Trainer, once for each logger."""
    charts: dict[str, list[object]] = {}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, HasCharts):
            charts |= {title: ["Multiline", keys] for title, keys in callback.charts().items()}
    for logger in tensorboards(trainer):
        if logger not in _laid_out:
            _laid_out.add(logger)
            logger.experiment.add_custom_scalars({LAYOUT_TITLE: charts})


def logged_step(trainer: pl.Trainer) -> int:
    """Return the step that Lightning's own logs carry now."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def tensorboards(trainer: pl.Trainer) -> list[TensorBoardLogger]:
    """Return the Trainer's TensorBoard loggers."""
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def check_tensorboard(trainer: pl.Trainer, quantity: str) -> None:
    """Say where a quantity that only TensorBoard can show will be dropped."""
    if not tensorboards(trainer):
        inform(f"{quantity!r} is written to TensorBoard alone, and this Trainer has no TensorBoardLogger: give it one.")
