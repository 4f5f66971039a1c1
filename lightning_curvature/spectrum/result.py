"""The result of one spectrum measurement, and how TensorBoard shows its density."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl

from lightning_curvature.linalg import SpectralDensity
from lightning_curvature.monitors.modules import ModuleTable
from lightning_curvature.reporting.loggers import logged_step, tensorboards, warn
from lightning_curvature.reporting.pictures import new_figure, picture_of


@dataclass(frozen=True)
class Spectrum:
    """Result of one spectrum measurement.

    Attributes:
        numbers: eigenvalues, trace and their errors by key; NaN for those that failed.
        density: spectral density, where asked for.
        modules: values by module, where asked for: shares in the eigenvectors, and the trace.
        reasons: why numbers are NaN, by key.
    """

    numbers: Mapping[str, float]
    density: SpectralDensity | None = None
    modules: ModuleTable | None = None
    reasons: Mapping[str, str] = field(default_factory=dict)

    def values(self) -> dict[str, float]:
        """Return all numbers by key."""
        return dict(self.numbers)

    def draw(self, title: str = "Hessian") -> Any:
        """Return a matplotlib figure of the density; None where there is none, or no matplotlib."""
        return None if self.density is None else _density_figure(title, self.density)


def report_density(trainer: pl.Trainer, key: str, density: SpectralDensity) -> None:
    """Write a density to all TensorBoard loggers: a histogram of all N eigenvalues, and with matplotlib its picture."""
    step = logged_step(trainer)
    writers = [logger.experiment for logger in tensorboards(trainer)]
    if not writers or not trainer.is_global_zero:
        return
    edges, shares = density.histogram()
    counts = shares * density.dimension
    figure = _density_figure(f"{key} at step {step}", density)
    if figure is None:
        warn("the spectral density comes without a picture: install matplotlib to have one beside the histogram.")
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
        if figure is not None:
            writer.add_image(f"{key}_picture", picture_of(figure), step, dataformats="HWC")


def _density_figure(title: str, density: SpectralDensity) -> Any:
    """Return the density on a logarithmic scale, its ends marked, as a figure, or None without matplotlib."""
    figure = new_figure(figsize=(6.4, 3.6), dpi=100)
    if figure is None:
        return None
    grid = density.grid()
    axes = figure.add_subplot()
    values = density.evaluate(grid).numpy()
    axes.semilogy(grid.numpy(), values, linewidth=1.2)
    # Below a tenth of one eigenvalue lie only the tails of the smoothing, whose 1e-300 would set the axis.
    axes.set_ylim(0.1 / (density.dimension * density.default_width()), 3.0 * values.max())
    # There a single eigenvalue may lie too: its weight in a random vector is anything up to several N-ths.
    ends = float(density.nodes.min()), float(density.nodes.max())
    for end in ends:
        axes.axvline(end, color="tab:red", linestyle=":", linewidth=1.2)
    axes.set_xlabel("eigenvalue of the Hessian")
    axes.set_title(f"{title}: from {ends[0]:.3g} to {ends[1]:.3g}", fontsize=10)
    axes.set_ylabel("density")
    return figure
