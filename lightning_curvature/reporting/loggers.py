"""Where numbers go: loggers, ``callback_metrics``, the progress bar, TensorBoard's layout.

The only home of private Trainer attributes.
"""

import math
import os
import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_curvature.linalg import SpectralDensity
from lightning_curvature.noise.result import NoiseCurvature
from lightning_curvature.reporting.pictures import new_figure, picture_of
from lightning_curvature.stabilization.result import SampleGrowth

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
        logger.log_metrics(dict(values), step=trainer.fit_loop.epoch_loop._batches_that_stepped)
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
    for logger in _tensorboards(trainer):
        if logger not in _laid_out:
            _laid_out.add(logger)
            logger.experiment.add_custom_scalars({LAYOUT_TITLE: charts})


def _tensorboards(trainer: pl.Trainer) -> list[TensorBoardLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def check_tensorboard(trainer: pl.Trainer, quantity: str) -> None:
    """Say where a quantity that only TensorBoard can show will be dropped."""
    if not _tensorboards(trainer):
        inform(f"{quantity!r} is written to TensorBoard alone, and this Trainer has no TensorBoardLogger: give it one.")


def report_density(trainer: pl.Trainer, key: str, density: SpectralDensity) -> None:
    """Write a spectral density to every TensorBoard logger: a histogram of all N eigenvalues, and a picture of it.

    The picture needs matplotlib; without it the histogram comes alone, with one warning.
    """
    step = trainer.fit_loop.epoch_loop._batches_that_stepped
    writers = [logger.experiment for logger in _tensorboards(trainer)]
    if not writers or not trainer.is_global_zero:
        return
    edges, shares = density.histogram()
    counts = shares * density.dimension
    picture = _density_picture(key, step, density)
    for writer in writers:
        writer.add_histogram_raw(
            key,
            min=float(edges[0]),
            max=float(edges[-1]),
            num=density.dimension,
            sum=density.moment(1) * density.dimension,
            sum_squares=density.moment(2) * density.dimension,
            bucket_limits=edges[1:].tolist(),
            bucket_counts=counts.tolist(),
            global_step=step,
        )
        if picture is not None:
            writer.add_image(f"{key}_picture", picture, step, dataformats="HWC")


def report_growth(trainer: pl.Trainer, prefix: str, growth: SampleGrowth) -> None:
    """Write a table of sample growth: to TensorBoard against k and as a picture, and as files where loggers write."""
    if not trainer.is_global_zero:
        return
    step = trainer.fit_loop.epoch_loop._batches_that_stepped
    figure = growth.draw(f"{prefix}: sample growth at step {step}") if trainer.loggers else None
    if figure is None and trainer.loggers:
        warn("sample growth comes without a picture: install matplotlib to have one.")
    for writer in (logger.experiment for logger in _tensorboards(trainer)):
        for (criterion, estimator, dimension, sigma), curve in growth.curves().items():
            parts = [criterion, *([f"D={dimension}"] if dimension else []), *([f"sigma={sigma:g}"] if sigma else [])]
            for k, row in curve.items():
                writer.add_scalar(f"{prefix}_by_samples/step={step}/{'_'.join([*parts, estimator])}", row.value, k)
        if figure is not None:
            writer.add_image(f"{prefix}/sample_growth", picture_of(figure), step, dataformats="HWC")
    folder = next((logger.log_dir for logger in trainer.loggers if getattr(logger, "log_dir", None)), None)
    if folder is None:
        return
    name = os.path.join(folder, f"{prefix.replace('/', '-')}-stabilization-step={step}")
    try:
        files = get_filesystem(folder)
        files.makedirs(folder, exist_ok=True)
        growth.to_csv(f"{name}.csv")
        if figure is not None:
            with files.open(f"{name}.png", "wb") as file:
                figure.savefig(file)
    except OSError as error:
        # On one rank alone, where the others go on.
        warn(
            f"the logger's folder must be one that can be written to, got {folder!r} ({error}): the table is in the "
            "monitor's result alone."
        )


def report_noise(trainer: pl.Trainer, prefix: str, noise: NoiseCurvature) -> None:
    """Write pictures of the noise against the curvature to every TensorBoard logger."""
    writers = [logger.experiment for logger in _tensorboards(trainer)]
    if not writers or not trainer.is_global_zero:
        return
    step = trainer.fit_loop.epoch_loop._batches_that_stepped
    title = f"{prefix}: {noise.parameter} at step {step}"
    for key, figure in (("noise_scatter", noise.draw(title)), ("noise_matrices", noise.draw_matrices(title))):
        if figure is None:
            warn("the noise covariance comes without pictures: install matplotlib to have them.")
            return
        for writer in writers:
            writer.add_image(f"{prefix}/{key}", picture_of(figure), step, dataformats="HWC")


def _density_picture(key: str, step: int, density: SpectralDensity) -> Any:
    """The density on a logarithmic scale as an image, (H, W, 3) uint8, or None without matplotlib."""
    figure = new_figure(figsize=(6.4, 3.6), dpi=100)
    if figure is None:
        warn("the spectral density comes without a picture: install matplotlib to have one beside the histogram.")
        return None
    grid = density.grid()
    axes = figure.add_subplot()
    values = density.evaluate(grid).numpy()
    axes.semilogy(grid.numpy(), values, linewidth=1.2)
    # Below a tenth of one eigenvalue there is nothing to see but the tails of the smoothing. They go down to 1e-300 and
    # would decide where the upper end is.
    axes.set_ylim(0.1 / (density.dimension * density.default_width()), 3.0 * values.max())
    axes.set_xlabel("eigenvalue of the Hessian")
    axes.set_title(f"{key} at step {step}", fontsize=10)
    axes.set_ylabel("density")
    return picture_of(figure)
