"""Writes values to loggers, ``callback_metrics`` and the progress bar.

No other file uses private attributes of the Trainer for this.
"""

import math
import warnings
import weakref
from collections.abc import Mapping, Sequence

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

# What monitors have written last, finite or not, and at which step: callback_metrics do not tell new from old.
_latest: "weakref.WeakKeyDictionary[pl.Trainer, dict[str, tuple[int, float]]]" = weakref.WeakKeyDictionary()


class CurvatureWarning(UserWarning):
    """A measurement failed, or its values are unreliable."""


def warn(message: str, any_rank: bool = False) -> None:
    """Warn once a process for each distinct message (Python's registry): on rank 0, or on this rank if ``any_rank``."""
    if any_rank:
        warnings.warn(message, category=CurvatureWarning, stacklevel=3)
    else:
        rank_zero_warn(message, category=CurvatureWarning, stacklevel=4)


def inform(message: str) -> None:
    """Log a message that needs no action, on rank 0, through Lightning's logger."""
    rank_zero_info(message)


def forget(trainer: pl.Trainer) -> None:
    """Forget what monitors wrote in an earlier fit, whose steps count anew."""
    _latest.pop(trainer, None)


def report(
    trainer: pl.Trainer, values: Mapping[str, float], progress_bar: Sequence[str] = (), points: bool = True
) -> None:
    """Write values to every logger at the step at which Lightning logs, and to ``trainer.callback_metrics``.

    ``callback_metrics`` keeps the last finite value of a key, since EarlyStopping ends training at a NaN, and one step
    uphill is no reason to. The loggers get the measured values; one that several monitors write at a step, such as 2/η,
    they get once. TensorBoard gets none without ``points``.
    """
    step = logged_step(trainer)
    latest = _latest.setdefault(trainer, {})
    new = {key: value for key, value in values.items() if latest.get(key) != (step, value)}
    latest.update({key: (step, value) for key, value in values.items()})
    for logger in trainer.loggers if new else ():
        if points or not isinstance(logger, TensorBoardLogger):
            logger.log_metrics(new, step=step)
    for key, value in values.items():
        if math.isfinite(value) or key not in trainer.callback_metrics:
            # The properties return the connector's own dicts; LearningRateMonitor relies on this too.
            tensor = torch.tensor(value, dtype=torch.float32, device=trainer.strategy.root_device)
            trainer.callback_metrics[key] = tensor
    trainer.progress_bar_metrics.update({key: values[key] for key in progress_bar if key in values})


def written_now(trainer: pl.Trainer) -> dict[str, float]:
    """Return the values that monitors have written at this step, as they were measured; on every rank."""
    step = logged_step(trainer)
    return {key: value for key, (at, value) in _latest.get(trainer, {}).items() if at == step}


def logged_step(trainer: pl.Trainer) -> int:
    """Return the step that Lightning's own logs carry now."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def tensorboards(trainer: pl.Trainer) -> list[TensorBoardLogger]:
    """Return the Trainer's TensorBoard loggers."""
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def check_tensorboard(trainer: pl.Trainer, quantity: str) -> None:
    """Log a message if the Trainer has no TensorBoard logger for a quantity that needs one."""
    if not tensorboards(trainer):
        inform(f"{quantity!r} is written to TensorBoard alone, and this Trainer has no TensorBoardLogger: give it one.")
