"""The result of one measurement of the noise against the curvature: its numbers as keys, text, table and pictures."""

import csv
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
from lightning.fabric.utilities.cloud_io import get_filesystem
from torch import Tensor

from lightning_curvature.functional.noise import CouplingTest, PowerLaw, SampleSpectra, linear_sample_spectra
from lightning_curvature.noise.options import Quantity, keys_of
from lightning_curvature.noise.pictures import draw_matrices, draw_scatter
from lightning_curvature.noise.problem import Route
from lightning_curvature.reporting.loggers import logged_step, tensorboards, warn
from lightning_curvature.reporting.pictures import picture_of

# Attributes of the comparisons of C with H, by key.
COMPARED = {
    "noise_commutativity": "commutativity",
    "noise_commutativity_relative": "relative_commutativity",
    "noise_alignment": "alignment",
    "noise_spearman": "spearman",
    "noise_coupling": "coupling",
}


class ChainLink(NamedTuple):
    """One approximation of C by activity–weight duality.

    Attributes:
        gamma: its power law against H, or None.
        norm, distance: ‖·‖_F, and ‖· − C‖_F / ‖C‖_F.
        diagonal: in H's eigenbasis, (𝒩,).
    """

    gamma: PowerLaw | None
    norm: float
    distance: float
    diagonal: Tensor


@dataclass(frozen=True, eq=False)
class NoiseCurvature:
    """The noise covariance C of SGD in the eigenbasis of the Hessian H, on one block of parameters.

    Numbers that were not asked for are None or NaN.

    Attributes:
        parameter, quantities: name of the block, and the quantities that were asked for.
        route: "kronecker", from the factors of a linear layer, or "general".
        samples, batch_size, dimension: n, b and D.
        curved: number of directions whose curvature is above rounding; others stand in the arrays, and in no number.
        curvatures: H_ii, descending, (𝒩,) float64.
        variances: C_ii, (𝒩,).
        second_moments: E_p[Σ_m κ_m² (u_m · v_i)²] = 2b C_ii/σ_w² by duality, (𝒩,).
        vectors: v_i as rows, (𝒩, D).
        shown, shown_random: leading part of C in the eigenbasis, and as large a part of C with random eigenvectors.
        gamma, gamma_awd: power laws against H_ii, of C_ii and of ``second_moments``.
        commutativity: ‖CH − HC‖_F / (‖C‖_F ‖H‖_F).
        relative_commutativity, random_commutativity: ‖CH − HC‖_F / ‖CH‖_F, and for a C with random eigenvectors.
        alignment, spearman: energy on the diagonal of C; rank correlation of C_ii and H_ii.
        coupling, spikes: μ; M, the participation ratio of C's eigenvalues.
        haar, test: μ of randomly rotated C, (draws,); μ against theory.
        weight_variance: σ_w².
        degenerate: share of the eigenvalues that equal the one before: eigenvectors within such a group may be any
            directions, and entries of C with them.
        unpaired: share of samples without a partner of their class.
        chain: approximations of C, by name.
        reasons: why a number is NaN, by its key or quantity.
    """

    parameter: str
    quantities: tuple[Quantity, ...]
    route: Route
    samples: int
    batch_size: int
    dimension: int
    curved: int
    curvatures: Tensor
    variances: Tensor
    vectors: Tensor
    shown: Tensor
    second_moments: Tensor | None = None
    shown_random: Tensor | None = None
    gamma: PowerLaw | None = None
    gamma_awd: PowerLaw | None = None
    commutativity: float = math.nan
    relative_commutativity: float = math.nan
    random_commutativity: float = math.nan
    alignment: float = math.nan
    spearman: float = math.nan
    coupling: float = math.nan
    spikes: float = math.nan
    haar: Tensor | None = None
    test: CouplingTest | None = None
    weight_variance: float = math.nan
    degenerate: float = 0.0
    unpaired: float = 0.0
    chain: Mapping[str, ChainLink] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)

    def values(self, quantities: Iterable[str] | None = None) -> dict[str, float]:
        """Return the numbers of the given quantities by key; default: of those that were asked for."""
        numbers = {key: getattr(self, name) for key, name in COMPARED.items()}
        numbers["noise_commutativity_random"] = self.random_commutativity
        if self.haar is not None and self.test is not None:
            numbers |= {"noise_coupling_random": float(self.haar.mean()), "noise_coupling_z": self.test.z}
        laws = {"noise_gamma": self.gamma, "noise_gamma_awd": self.gamma_awd}
        laws |= {f"noise_gamma_awd_{name}": link.gamma for name, link in self.chain.items()}
        for key, law in laws.items():
            if law is not None:
                numbers |= {key: law.exponent, f"{key}_stderr": law.standard_error}
        keys = keys_of(self.quantities if quantities is None else quantities)
        return {key: numbers.get(key, math.nan) for key in keys}

    def sample_spectra(self, activations: Tensor, curvatures: Tensor) -> SampleSpectra:
        """Return eigenpairs of single samples in the basis of this measurement: see :func:`linear_sample_spectra`."""
        return linear_sample_spectra(activations, curvatures, self.vectors.to(activations.device))

    def to_csv(self, path: Path | str) -> None:
        """Write H_ii, C_ii and their counterparts by duality, a line a direction; the path may be a URL for fsspec."""
        columns = {"curvature": self.curvatures, "variance": self.variances, "second_moment": self.second_moments}
        columns |= {f"variance_{name}": link.diagonal for name, link in self.chain.items()}
        table = {name: column.tolist() for name, column in columns.items() if column is not None}
        with get_filesystem(path).open(str(path), "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["direction", *table])
            writer.writerows([number, *row] for number, row in enumerate(zip(*table.values(), strict=True), start=1))

    def __str__(self) -> str:
        """Return the numbers as text, with the range of the fit and the numbers of chance."""
        count = len(self.curvatures)
        curved = f"{self.curved:,} of " if self.curved < count else ""
        lines = [
            f"{self.parameter}: D = {self.dimension:,}, {curved}{count:,} directions, {self.samples:,} samples, "
            f"b = {self.batch_size}, {self.route} route"
        ]
        lines += [
            f"{title:<16}{law.exponent:7.3f} ± {law.standard_error:.3f}  over {law.points:,} directions, "
            f"H_ii from {law.lowest:.2e} to {law.highest:.2e}"
            for title, law in (("γ", self.gamma), ("γ by duality", self.gamma_awd))
            if law is not None
        ]
        if not math.isnan(self.commutativity):
            lines.append(
                f"{'commutativity':<16}{self.commutativity:7.4f}, relative to CH {self.relative_commutativity:.3f}, by "
                f"chance {self.random_commutativity:.3f}"
            )
        values = (("alignment", self.alignment), ("Spearman", self.spearman))
        lines += [f"{title:<16}{value:7.3f}" for title, value in values if not math.isnan(value)]
        if self.test is not None and self.haar is not None:
            lines.append(
                f"{'coupling':<16}{self.coupling:7.4f}, by chance {float(self.haar.mean()):.4f} (rotated), "
                f"{self.test.baseline:.4f} (theory, M = {self.spikes:.1f}), Z = {self.test.z:.0f}"
            )
        if self.chain:
            lines.append(f"{'duality':<16}{'γ':>7}{'norm':>11}{'distance from C':>17}")
            for name, link in self.chain.items():
                exponent = math.nan if link.gamma is None else link.gamma.exponent
                lines.append(f"  {name:<14}{exponent:7.3f}{link.norm:11.2e}{link.distance:17.3f}")
        return "\n".join([*lines, *(f"no {key}: {reason}" for key, reason in self.reasons.items())])

    def draw(self, title: str = "") -> Any:
        """Draw C_ii against H_ii on logarithmic axes with the fits: a matplotlib figure, or None without matplotlib."""
        drawn = (("C", self.gamma, self.variances), ("duality", self.gamma_awd, self.second_moments))
        laws = [(label, law, y) for label, law, y in drawn if law is not None and y is not None]
        title = title or f"{self.parameter}: noise against curvature"
        return draw_scatter(title, self.curvatures, laws, slopes=self.gamma is not None)

    def draw_matrices(self, title: str = "") -> Any:
        """Draw C in the eigenbasis and its coupling R beside that of rotated noise; None without matplotlib."""
        title = title or f"{self.parameter}: in the eigenbasis of the Hessian"
        return draw_matrices(title, self.shown, self.shown_random)


def report_noise(trainer: pl.Trainer, prefix: str, noise: NoiseCurvature) -> None:
    """Write pictures of the noise against the curvature to every TensorBoard logger."""
    writers = [logger.experiment for logger in tensorboards(trainer)]
    if not writers or not trainer.is_global_zero:
        return
    step = logged_step(trainer)
    title = f"{prefix}: {noise.parameter} at step {step}"
    for key, figure in (("noise_scatter", noise.draw(title)), ("noise_matrices", noise.draw_matrices(title))):
        if figure is None:
            warn("the noise covariance comes without pictures: install matplotlib to have them.")
            return
        for writer in writers:
            writer.add_image(f"{prefix}/{key}", picture_of(figure), step, dataformats="HWC")
