"""Pictures of the noise against the curvature: after P2's figures 1, 2 and 7."""

from typing import Any

import numpy
from torch import Tensor

from lightning_curvature.functional.noise import PowerLaw, coupling_matrix, mean_coupling
from lightning_curvature.noise.result import NoiseCurvature
from lightning_curvature.reporting.pictures import new_figure


def draw_scatter(result: NoiseCurvature, title: str = "") -> Any:
    """C_ii against H_ii with the line fitted, and by duality, beside slopes 1 and 2."""
    figure = new_figure(figsize=(5.4, 4.4), dpi=110)
    if figure is None:
        return None
    axes = figure.add_subplot()
    drawn = False
    for label, law, heights, color in (
        ("C", result.gamma, result.variances, "C0"),
        ("duality", result.gamma_awd, result.second_moments, "C1"),
    ):
        if law is not None and heights is not None:
            # Of the other curves the factor σ_w²/2b is not known: they are drawn through the same middle.
            shift = 1.0 if not drawn or result.gamma is None else _middle(result.gamma) / _middle(law)
            _draw_law(axes, label, law, result.curvatures, heights * shift, shift, color)
            drawn = True
    if result.gamma is not None:
        _draw_slopes(axes, result.gamma)
    axes.set(xscale="log", yscale="log", xlabel="curvature $H_{ii}$", ylabel="noise $C_{ii}$")
    axes.set_title(title or f"{result.parameter}: noise against curvature", fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if drawn:
        axes.legend(frameon=False, fontsize=8, loc="upper left")
    return figure


def _middle(law: PowerLaw) -> float:
    """Height of a fitted line at the geometric middle of its range."""
    return float(numpy.exp(law.log_factor) * (law.lowest * law.highest) ** (0.5 * law.exponent))


def _draw_law(
    axes: Any, label: str, law: PowerLaw, curvatures: Tensor, heights: Tensor, shift: float, color: str
) -> None:
    used = (curvatures >= law.lowest) & (heights > 0.0)
    axes.scatter(curvatures[used].numpy(), heights[used].numpy(), s=5, alpha=0.35, color=color, linewidths=0)
    ends = numpy.array([law.lowest, law.highest])
    line = shift * numpy.exp(law.log_factor) * ends**law.exponent
    axes.plot(
        ends, line, color=color, linewidth=1.4, label=f"{label}: γ = {law.exponent:.3f} ± {law.standard_error:.3f}"
    )


def _draw_slopes(axes: Any, law: PowerLaw) -> None:
    ends = numpy.array([law.lowest, law.highest])
    middle = (law.lowest * law.highest) ** 0.5
    for slope, style in ((1, ":"), (2, "--")):
        axes.plot(
            ends, _middle(law) * (ends / middle) ** slope, style, color="grey", linewidth=0.9, label=f"slope {slope}"
        )


def draw_matrices(result: NoiseCurvature, title: str = "") -> Any:
    """C in the eigenbasis of H, on a logarithmic scale; |R| of it; |R| of the same noise with random eigenvectors."""
    matrices = [("noise covariance $|C_{ij}|$", result.shown.abs(), True)]
    for name, matrix in (("coupling $|R_{ij}|$", result.shown), ("rotated at random", result.shown_random)):
        if matrix is not None:
            matrices.append((name, coupling_matrix(matrix).abs(), False))
    figure = new_figure(figsize=(0.6 + 3.6 * len(matrices), 3.8), dpi=110)
    if figure is None:
        return None
    from matplotlib.colors import LogNorm

    figure.suptitle(title or f"{result.parameter}: in the eigenbasis of the Hessian", fontsize=10)
    for axes, (name, matrix, logarithmic) in zip(
        figure.subplots(1, len(matrices), squeeze=False)[0], matrices, strict=True
    ):
        values = matrix.numpy()
        if logarithmic:
            top = float(numpy.nanmax(values)) or 1.0
            # Four decades: below them there is nothing to tell from zero.
            image = axes.imshow(numpy.maximum(values, 1e-4 * top), cmap="magma", norm=LogNorm(1e-4 * top, top))
        else:
            image = axes.imshow(values, cmap="Reds", vmin=0.0, vmax=1.0)
            name = f"{name}, mean {mean_coupling(matrix):.3f}"
        axes.set_title(name, fontsize=9)
        axes.set(xlabel="direction", ylabel="direction")
        figure.colorbar(image, ax=axes, shrink=0.8)
    return figure
