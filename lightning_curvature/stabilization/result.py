"""The result of one stabilization measurement: a table of criteria by k, its slopes, its text and its file."""

import csv
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.cloud_io import get_filesystem

from lightning_curvature.functional import DecaySlope, decay_slope, validated_sigma
from lightning_curvature.reporting.files import free_name
from lightning_curvature.reporting.loggers import logged_step, tensorboards, warn
from lightning_curvature.reporting.pictures import picture_of
from lightning_curvature.stabilization.pictures import Curve, draw_curves


@dataclass(frozen=True)
class CriterionRow:
    """One value of the table.

    Attributes:
        k: samples before the new one.
        criterion: "delta_1", "delta_2" or "delta_2_subspace"; with another order p in place of 2.
        estimator: "exact", "gaussian_moment", "quadratic" or "direct".
        dimension: D; N in the full space, 0 at the point.
        sigma: σ of the perturbation; 0 at the point.
        value: mean over the new samples.
        stderr_samples: its standard error over them; NaN for one.
        stderr_draws: its standard error over the draws; 0 for a closed form.
        deformation: the same mean power of f − f(w), the part of the increment that varies with the position.
        model_error: root mean square error of the quadratic model, relative to the increment, where it was compared.
        converged: whether the eigenvectors converged to the tolerance.
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
    def curve(self) -> Curve:
        """Criterion, estimator, D and σ: the curve against k that the row belongs to."""
        return self.criterion, self.estimator, self.dimension, self.sigma


@dataclass(frozen=True)
class SampleGrowth:
    """Result of one stabilization measurement.

    Attributes:
        rows: the table.
        seconds: time by stage ("subspace", "coefficients" and the estimators), over all k.
        products: Hessian–vector products of the eigensolver, over all k.
        residuals: by k, the largest ‖Hu − λu‖ of the eigenvectors u, relative to the largest ``|λ|``.
        tolerance: of the quadratic model, for :attr:`validated_sigma`.
        validity_keys: which of ``validated_sigma`` and ``validated_sigma_full_space`` are among :meth:`values`.
    """

    rows: tuple[CriterionRow, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    products: int = 0
    residuals: Mapping[int, float] = field(default_factory=dict)
    tolerance: float = 0.1
    validity_keys: tuple[str, ...] = ()

    @property
    def validated_sigma(self) -> float:
        """The largest σ up to which the quadratic model holds in the subspace at every k; NaN where none does."""
        return self.validated(in_subspace=True)

    @property
    def validated_sigma_full_space(self) -> float:
        """The same in the full space, where perturbations of one σ are longer by √(N/D)."""
        return self.validated(in_subspace=False)

    def validated(self, in_subspace: bool) -> float:
        """Return the largest σ up to which the quadratic model holds, in the subspace or the full space."""
        worst = self.model_errors(in_subspace)
        return validated_sigma(list(worst), list(worst.values()), self.tolerance)

    def model_errors(self, in_subspace: bool) -> dict[float, float]:
        """Return the largest relative error of the quadratic model by σ, in the subspace or the full space."""
        worst: dict[float, float] = {}
        for row in self.rows:
            if row.criterion.endswith("_subspace") == in_subspace and not math.isnan(row.model_error):
                worst[row.sigma] = max(worst.get(row.sigma, 0.0), row.model_error)
        return worst

    def curves(self) -> dict[Curve, dict[int, CriterionRow]]:
        """Return the rows by criterion, estimator, D and σ, and by k."""
        curves: dict[Curve, dict[int, CriterionRow]] = {}
        for row in self.rows:
            curves.setdefault(row.curve, {})[row.k] = row
        return curves

    def slopes(self) -> dict[Curve, DecaySlope]:
        """Return the exponent of k + 1 for each curve, see :func:`~.functional.decay_slope`."""
        curves = self.curves().items()
        return {name: decay_slope(list(curve), [row.value for row in curve.values()]) for name, curve in curves}

    def headline(self) -> dict[str, float]:
        """Return each criterion at the largest k and D, the first σ and estimator, with its standard error."""
        values: dict[str, float] = {}
        last = max((row.k for row in self.rows), default=0)
        for row in sorted((r for r in self.rows if r.k == last), key=lambda r: -r.dimension):
            if row.criterion not in values:
                error = math.hypot(row.stderr_samples, row.stderr_draws)
                values |= {row.criterion: row.value, f"{row.criterion}_stderr": error}
        return values

    def values(self) -> dict[str, float]:
        """Return the headline and the largest σ up to which the model holds, by key."""
        return self.headline() | {key: getattr(self, key) for key in self.validity_keys}

    @property
    def reasons(self) -> dict[str, str]:
        """Why values are NaN, by key."""
        values, reasons = self.values(), {}
        for key in (key for key, value in values.items() if math.isnan(value)):
            if key in self.validity_keys:
                reasons[key] = f"the quadratic model is within {self.tolerance:.0%} at no sigma: lower sigma"
            elif math.isfinite(values[key.removesuffix("_stderr")]):
                reasons[key] = "one new sample has no standard error: raise candidates"
            else:
                reasons[key] = "a loss is not finite"
        return reasons

    def to_csv(self, path: Path | str) -> None:
        """Write the table, one line a row; the path may be a URL that fsspec knows."""
        with get_filesystem(path).open(str(path), "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(CriterionRow)])
            writer.writeheader()
            writer.writerows(asdict(row) for row in self.rows)

    def __str__(self) -> str:
        """Return the table as text, with slopes against k + 1 ± standard errors from the scatter about the line."""
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
            lines.append(f"eigenvectors did not converge to the tolerance at k = {', '.join(map(str, unconverged))}")
        for where, in_subspace in (("subspace", True), ("full space", False)):
            if self.model_errors(in_subspace):
                valid = self.validated(in_subspace)
                upto = "at no σ" if math.isnan(valid) else f"up to σ = {valid:g}"
                lines.append(f"quadratic model in the {where} within {self.tolerance:.0%} {upto}")
        stages = ", ".join(f"{stage} {seconds:.3g}" for stage, seconds in self.seconds.items())
        lines.append(f"seconds: {stages}; {self.products} products for the subspaces")
        return "\n".join(lines)

    def draw(self, title: str = "") -> Any:
        """Return a matplotlib figure of all criteria against k with their slopes; None without matplotlib."""
        return draw_curves(self.curves(), self.slopes(), title)


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
    try:
        files = get_filesystem(folder)
        files.makedirs(folder, exist_ok=True)
        own = f"{prefix.replace('/', '-')}-stabilization-step={step}"
        name = free_name(files, os.path.join(folder, own), (".csv", ".png"))
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
