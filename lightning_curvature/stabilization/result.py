"""What a measurement of sample growth gave: a table of criteria by k, its slopes, a file and a picture of it."""

import csv
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.cloud_io import get_filesystem

from lightning_curvature.functional import DecaySlope, decay_slope, validated_sigma
from lightning_curvature.reporting.loggers import logged_step, tensorboards, warn
from lightning_curvature.reporting.pictures import new_figure, picture_of

POINT = "delta_1"


@dataclass(frozen=True)
class CriterionRow:
    """One value of the table.

    Attributes:
        k: samples before the new one.
        criterion: "delta_1", "delta_2" or "delta_2_subspace"; with another order p in place of 2.
        estimator: "exact", "gaussian_moment", "quadratic" or "direct".
        dimension: D; N in the full space, 0 at the point.
        sigma: σ of the probe; 0 at the point.
        value: mean over the new samples.
        stderr_samples: its standard error over them; NaN for one.
        stderr_draws: its standard error over the draws of the probe; 0 for a closed form.
        deformation: the same mean power of f − f(w), what the increment has beyond its value at the parameters: the
            part that depends on where one looks.
        model_error: root mean square error of the quadratic model, relative to the increment, where it was compared.
        converged: whether the eigenvectors were found to the tolerance.
    """

    k: int
    criterion: str
    estimator: str
    dimension: int
    sigma: float
    value: float
    stderr_samples: float
    stderr_draws: float
    deformation: float = 0.0
    model_error: float = math.nan
    converged: bool = True

    @property
    def curve(self) -> tuple[str, str, int, float]:
        """What rows of one curve against k have in common."""
        return self.criterion, self.estimator, self.dimension, self.sigma


@dataclass
class SampleGrowth:
    """The values of one measurement.

    Attributes:
        rows: the table.
        seconds: time by stage ("subspace", "coefficients" and the estimators), over all k.
        products: Hessian–vector products of the eigensolver, over all k.
        residuals: by k, the largest ‖Hu − λu‖ of the eigenvectors u, relative to the largest |λ|.
        tolerance: of the quadratic model, for :attr:`validated_sigma`.
    """

    rows: list[CriterionRow] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    products: int = 0
    residuals: dict[int, float] = field(default_factory=dict)
    tolerance: float = 0.1

    @property
    def validated_sigma(self) -> float:
        """The largest σ up to which the quadratic model holds in the subspace at every k; NaN where none does."""
        return self.validated(in_subspace=True)

    @property
    def validated_sigma_full_space(self) -> float:
        """The same in the full space, where probes of one σ are longer by √(N/D)."""
        return self.validated(in_subspace=False)

    def validated(self, in_subspace: bool) -> float:
        """The largest σ up to which the quadratic model holds, in the subspace or the full space."""
        worst = self.model_errors(in_subspace)
        return validated_sigma(list(worst), list(worst.values()), self.tolerance)

    def model_errors(self, in_subspace: bool) -> dict[float, float]:
        """The largest relative error of the quadratic model by σ, in the subspace or the full space."""
        worst: dict[float, float] = {}
        for row in self.rows:
            if row.criterion.endswith("_subspace") == in_subspace and not math.isnan(row.model_error):
                worst[row.sigma] = max(worst.get(row.sigma, 0.0), row.model_error)
        return worst

    def curves(self) -> dict[tuple[str, str, int, float], dict[int, CriterionRow]]:
        """Rows by criterion, estimator, D and σ, and by k."""
        found: dict[tuple[str, str, int, float], dict[int, CriterionRow]] = {}
        for row in self.rows:
            found.setdefault(row.curve, {})[row.k] = row
        return found

    def slopes(self) -> dict[tuple[str, str, int, float], DecaySlope]:
        """Exponent of k + 1 for each curve, see :func:`~.functional.decay_slope`."""
        return {
            name: decay_slope(list(curve), [row.value for row in curve.values()])
            for name, curve in self.curves().items()
        }

    def headline(self) -> dict[str, float]:
        """Each criterion at the largest k, the largest D, the first σ and the first estimator, with its errors."""
        values: dict[str, float] = {}
        last = max(row.k for row in self.rows) if self.rows else 0
        for row in sorted((r for r in self.rows if r.k == last), key=lambda r: -r.dimension):
            if row.criterion not in values:
                values |= {
                    row.criterion: row.value,
                    f"{row.criterion}_stderr": math.hypot(row.stderr_samples, row.stderr_draws),
                }
        return values

    def to_csv(self, path: Path | str) -> None:
        """Write the table, one line a row; the path may be a URL that fsspec knows."""
        with get_filesystem(path).open(str(path), "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(CriterionRow)])
            writer.writeheader()
            writer.writerows(asdict(row) for row in self.rows)

    def __str__(self) -> str:
        """The table as text: a line for each curve with its slope against k + 1, and the seconds by stage.

        ± is the standard error of the slope, from the scatter about the line. Standard errors of the values,
        deformations and model errors are in ``rows``.
        """
        sizes = sorted({row.k for row in self.rows})
        width = 2 + max([16, *(len(row.criterion) for row in self.rows)])
        lines = [f"{'criterion':<{width}}{'estimator':<17}{'D':>9}{'σ':>9}" + "".join(f"{f'k={k}':>11}" for k in sizes)]
        lines[0] += f"{'slope':>9}{'±':>7}"
        slopes = self.slopes()
        for name, curve in self.curves().items():
            criterion, estimator, dimension, sigma = name
            line = f"{criterion:<{width}}{estimator:<17}{dimension or '–':>9}{format(sigma, 'g') if sigma else '–':>9}"
            line += "".join(f"{curve[k].value:>11.3e}" if k in curve else f"{'–':>11}" for k in sizes)
            lines.append(line + f"{slopes[name].slope:>9.2f}{slopes[name].standard_error:>7.2f}")
        if unconverged := sorted({row.k for row in self.rows if not row.converged}):
            lines.append(f"eigenvectors not found to the tolerance at k = {', '.join(map(str, unconverged))}")
        for where, in_subspace in (("subspace", True), ("full space", False)):
            if self.model_errors(in_subspace):
                valid = self.validated(in_subspace)
                upto = "at no σ" if math.isnan(valid) else f"up to σ = {valid:g}"
                lines.append(f"quadratic model in the {where} within {self.tolerance:.0%} {upto}")
        lines.append(
            "seconds: "
            + ", ".join(f"{stage} {seconds:.3g}" for stage, seconds in self.seconds.items())
            + f"; {self.products} products for the subspaces"
        )
        return "\n".join(lines)

    def draw(self, title: str = "") -> Any:
        """Draw all criteria against k with their slopes, on logarithmic axes.

        Returns:
            A matplotlib figure, or None without matplotlib.
        """
        sigmas = sorted({row.sigma for row in self.rows if row.sigma}) or [0.0]
        figure = new_figure(figsize=(1.6 + 4.6 * len(sigmas), 4.6), dpi=110)
        if figure is None:
            return None
        figure.suptitle(title, fontsize=11)
        panels = figure.subplots(1, len(sigmas), squeeze=False, sharey=True)[0]
        for axes, sigma in zip(panels, sigmas, strict=True):
            self._draw_panel(axes, sigma)
        panels[0].set_ylabel("criterion")
        return figure

    def _draw_panel(self, axes: Any, sigma: float) -> None:
        """All curves of one σ: a line for the first estimator of each, marks for the others."""
        slopes, lines = self.slopes(), set[tuple[str, int]]()
        for (criterion, estimator, dimension, own), curve in self.curves().items():
            if own not in (0.0, sigma):
                continue
            rows = [row for row in curve.values() if row.value > 0.0]
            errors = [_together(row.stderr_samples, row.stderr_draws) for row in rows]
            first = (criterion, dimension) not in lines
            lines.add((criterion, dimension))
            label = f"{_LABELS.get(criterion, criterion)}{f', D = {dimension:,}' * bool(dimension)}"
            slope = slopes[criterion, estimator, dimension, own].slope
            axes.errorbar(
                [row.k + 1 for row in rows],
                [row.value for row in rows],
                [0.0 if math.isnan(e) else min(e, 0.9 * row.value) for e, row in zip(errors, rows, strict=True)],
                label=f"{label}: slope {slope:.2f}" if first else f"… {estimator.replace('_', ' ')}",
                color="black" if criterion == POINT else f"C{len(lines) % 10}",
                marker=_MARKERS[estimator],
                markersize=4,
                linestyle="none" if not first else "--" if criterion == POINT else "-",
                linewidth=1.2,
                elinewidth=0.8,
            )
        axes.set(xscale="log", yscale="log", xlabel="k + 1 samples")
        sizes = sorted({row.k + 1 for row in self.rows})
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        if sigma:
            axes.set_title(f"σ = {sigma:g}", fontsize=10)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=7, loc="lower left")


_LABELS = {"delta_1": "Δ₁", "delta_2": "Δ₂", "delta_2_subspace": "Δ₂ in the subspace"}
_MARKERS = {"direct": "o", "quadratic": "s", "gaussian_moment": "^", "exact": "."}


def _together(*errors: float) -> float:
    """Standard error of independent parts; one that is not known is left out, NaN where none is, or none but zeros."""
    known = [error for error in errors if not math.isnan(error)]
    total = math.hypot(*known)
    return total if total or len(known) == len(errors) else math.nan


def mean_and_error(values: Iterable[float]) -> tuple[float, float]:
    """Mean and its standard error; NaN for the error of one value."""
    numbers = list(values)
    mean = math.fsum(numbers) / len(numbers)
    if len(numbers) < 2:
        return mean, math.nan
    square = math.fsum((number - mean) ** 2 for number in numbers)
    return mean, math.sqrt(square / (len(numbers) - 1) / len(numbers))


def report_growth(trainer: pl.Trainer, prefix: str, growth: SampleGrowth) -> None:
    """Write a table of sample growth: to TensorBoard against k and as a picture, and as files where loggers write."""
    if not trainer.is_global_zero:
        return
    step = logged_step(trainer)
    figure = growth.draw(f"{prefix}: sample growth at step {step}") if trainer.loggers else None
    if figure is None and trainer.loggers:
        warn("sample growth comes without a picture: install matplotlib to have one.")
    for writer in (logger.experiment for logger in tensorboards(trainer)):
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
