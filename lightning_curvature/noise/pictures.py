"""Pictures of the noise against the curvature, after figures 1, 2 and 7 of Zhang, Yang and Tu (2026)."""

from collections.abc import Sequence
from typing import Any

import numpy
from torch import Tensor

from lightning_curvature.functional.noise import PowerLaw, coupling_matrix, mean_coupling
from lightning_curvature.reporting.pictures import new_figure


def draw_scatter(title: str, curvatures: Tensor, laws: Sequence[tuple[str, PowerLaw, Tensor]], slopes: bool) -> Any:
    """Return a figure of heights against H_ii with fitted lines, or None without matplotlib.

    ``laws`` are label, fitted line and heights, (𝒩,). All are drawn through the middle of the first, since heights by
    duality lack the factor σ_w²/2b. ``slopes`` adds lines of slopes 1 and 2.
    """
    figure = new_figure(figsize=(5.4, 4.4), dpi=110)
    if figure is None:
        return None
    axes = figure.add_subplot()
    for label, law, heights in laws:
        color = "C0" if label == "C" else "C1"
        shift = _middle(laws[0][1]) / _middle(law)
        used = (curvatures >= law.lowest) & (heights > 0.0)
        y = (heights[used] * shift).numpy()
        axes.scatter(curvatures[used].numpy(), y, s=5, alpha=0.35, color=color, linewidths=0)
        text = f"{label}: γ = {law.exponent:.3f} ± {law.standard_error:.3f}"
        _draw_line(axes, law, shift * _middle(law), law.exponent, color=color, linewidth=1.4, label=text)
    if slopes:
        first = laws[0][1]
        for slope, style in ((1, ":"), (2, "--")):
            look = {"color": "grey", "linestyle": style, "linewidth": 0.9, "label": f"slope {slope}"}
            _draw_line(axes, first, _middle(first), slope, **look)
    axes.set(xscale="log", yscale="log", xlabel="curvature $H_{ii}$", ylabel="noise $C_{ii}$")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if laws:
        axes.legend(frameon=False, fontsize=8, loc="upper left")
    return figure


def _middle(law: PowerLaw) -> float:
    """Height of a fitted line at the geometric middle of its range."""
    return float(numpy.exp(law.log_factor) * (law.lowest * law.highest) ** (0.5 * law.exponent))


def _draw_line(axes: Any, law: PowerLaw, middle: float, slope: float, **style: Any) -> None:
    """Draw a line of a slope through a height at the middle of the range of a law."""
    ends = numpy.array([law.lowest, law.highest])
    axes.plot(ends, middle * (ends / (law.lowest * law.highest) ** 0.5) ** slope, **style)


def draw_matrices(title: str, covariance: Tensor, rotated: Tensor | None) -> Any:
    """Return a figure of C in the eigenbasis of H, its coupling and that of rotated C, or None without matplotlib."""
    couplings = {
        name: coupling_matrix(matrix).abs()
        for name, matrix in (("coupling $|R_{ij}|$", covariance), ("rotated at random", rotated))
        if matrix is not None
    }
    # One below the other: TensorBoard shows images in narrow columns.
    figure = new_figure(figsize=(4.2, 0.4 + 3.4 * (1 + len(couplings))), dpi=110)
    if figure is None:
        return None
    from matplotlib.colors import LogNorm

    figure.suptitle(title, fontsize=10)
    first, *others = figure.subplots(1 + len(couplings), 1, squeeze=False)[:, 0]
    values = covariance.abs().numpy()
    top = float(numpy.nanmax(values)) or 1.0
    # Four decades: below them there is nothing to tell from zero.
    images = [first.imshow(numpy.maximum(values, 1e-4 * top), cmap="magma", norm=LogNorm(1e-4 * top, top))]
    first.set_title("noise covariance $|C_{ij}|$", fontsize=9)
    for axes, (name, matrix) in zip(others, couplings.items(), strict=True):
        images.append(axes.imshow(matrix.numpy(), cmap="Reds", vmin=0.0, vmax=1.0))
        axes.set_title(f"{name}, mean {mean_coupling(matrix):.3f}", fontsize=9)
    for image in images:
        image.axes.set(xlabel="direction", ylabel="direction")
        figure.colorbar(image, ax=image.axes)
    return figure
