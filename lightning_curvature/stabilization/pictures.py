"""How a stabilization result is shown: its picture, TensorBoard's curves against k, and the files of the logger."""

import math
import os
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.cloud_io import get_filesystem

from lightning_curvature.reporting.loggers import logged_step, tensorboards, warn
from lightning_curvature.reporting.pictures import new_figure, picture_of
from lightning_curvature.stabilization.result import SampleGrowth

_LABELS = {"delta_1": "Δ₁", "delta_2": "Δ₂", "delta_2_subspace": "Δ₂ in the subspace"}
_MARKERS = {"direct": "o", "quadratic": "s", "gaussian_moment": "^", "exact": "."}


def draw_curves(result: SampleGrowth, title: str) -> Any:
    """Return a matplotlib figure of all curves, a panel for each σ; None without matplotlib."""
    sigmas = sorted({row.sigma for row in result.rows if row.sigma}) or [0.0]
    figure = new_figure(figsize=(1.6 + 4.6 * len(sigmas), 4.6), dpi=110)
    if figure is None:
        return None
    figure.suptitle(title, fontsize=11)
    panels = figure.subplots(1, len(sigmas), squeeze=False, sharey=True)[0]
    for axes, sigma in zip(panels, sigmas, strict=True):
        _draw_panel(axes, result, sigma)
    panels[0].set_ylabel("criterion")
    return figure


def _draw_panel(axes: Any, result: SampleGrowth, sigma: float) -> None:
    """Draw all curves of one σ: a line for the first estimator of each, marks for the others."""
    slopes, lines = result.slopes(), set[tuple[str, int]]()
    for name, curve in result.curves().items():
        criterion, estimator, dimension, curve_sigma = name
        if curve_sigma not in (0.0, sigma):
            continue
        rows = [row for row in curve.values() if row.value > 0.0]
        # An error that is not known (of one new sample) is left out.
        errors = [math.hypot(*(e for e in (r.stderr_samples, r.stderr_draws) if not math.isnan(e))) for r in rows]
        at_point, first = criterion == "delta_1", (criterion, dimension) not in lines
        lines.add((criterion, dimension))
        label = f"{_LABELS.get(criterion, criterion)}{f', D = {dimension:,}' * bool(dimension)}"
        axes.errorbar(
            [row.k + 1 for row in rows],
            [row.value for row in rows],
            [min(error, 0.9 * row.value) for error, row in zip(errors, rows, strict=True)],
            label=f"{label}: slope {slopes[name].slope:.2f}" if first else f"… {estimator.replace('_', ' ')}",
            color="black" if at_point else f"C{len(lines) % 10}",
            marker=_MARKERS[estimator],
            markersize=4,
            linestyle="none" if not first else "--" if at_point else "-",
            linewidth=1.2,
            elinewidth=0.8,
        )
    axes.set(xscale="log", yscale="log", xlabel="k + 1 samples")
    sizes = sorted({row.k + 1 for row in result.rows})
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    if sigma:
        axes.set_title(f"σ = {sigma:g}", fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=7, loc="lower left")


def report_table(trainer: pl.Trainer, prefix: str, result: SampleGrowth) -> None:
    """Write the table: to TensorBoard against k and as a picture, and as files where loggers write."""
    if not trainer.is_global_zero:
        return
    step = logged_step(trainer)
    figure = result.draw(f"{prefix}: stabilization at step {step}") if trainer.loggers else None
    if figure is None and trainer.loggers:
        warn("the stabilization table comes without a picture: install matplotlib to have one.")
    for writer in (logger.experiment for logger in tensorboards(trainer)):
        for (criterion, estimator, dimension, sigma), curve in result.curves().items():
            words = [criterion, *([f"D={dimension}"] if dimension else []), *([f"sigma={sigma:g}"] if sigma else [])]
            for k, row in curve.items():
                writer.add_scalar(f"{prefix}_by_samples/step={step}/{'_'.join([*words, estimator])}", row.value, k)
        if figure is not None:
            writer.add_image(f"{prefix}/sample_growth", picture_of(figure), step, dataformats="HWC")
    folder = next((logger.log_dir for logger in trainer.loggers if getattr(logger, "log_dir", None)), None)
    if folder is None:
        return
    name = os.path.join(folder, f"{prefix.replace('/', '-')}-stabilization-step={step}")
    try:
        files = get_filesystem(folder)
        files.makedirs(folder, exist_ok=True)
        result.to_csv(f"{name}.csv")
        if figure is not None:
            with files.open(f"{name}.png", "wb") as file:
                figure.savefig(file)
    except OSError as error:
        # On one rank alone, where the others go on.
        warn(
            f"the logger's folder must be one that can be written to, got {folder!r} ({error}): the table is in the "
            "monitor's result alone."
        )
