"""The palette of the figures, and how lines, errors and edges are drawn."""

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_curvature.report.series import Points

# One colour a run, or a quantity where there is one run; the same as in the examples.
COLOURS = ("#1b3a6b", "#e69f00", "#009e73", "#cc79a7", "#4f97cf", "#d55e00", "#7a5fa6", "#8a8a2b", "#6e6e6e", "#a9d3f0")
# Of the regimes, in the order of functional.REGIMES.
REGIME_COLOURS = ("#ececec", "#c4c4c4", "#8fc7ea", "#1b3a6b", "#c9b8e0", "#e69f00", "#d55e00", "#111111")
# Colour and width of quantities that stand in several figures.
_STYLES: dict[str, tuple[str, float]] = {
    "edge_ratio": ("#333333", 1.6),
    "stability_index": ("#7a5fa6", 1.6),
    "lambda_max": ("#1b3a6b", 1.6),
    "preconditioned_lambda_max": ("#1b3a6b", 1.6),
    "gauss_newton_lambda_max": ("#009e73", 1.2),
    "lambda_2": ("#4f97cf", 1.2),
    "lambda_3": ("#a9d3f0", 1.2),
    "lambda_min": ("#cc79a7", 1.2),
    "lambda_dir": ("#8fc7ea", 3.2),
    "lambda_fd": ("#e69f00", 1.6),
    "lambda_kl": ("#009e73", 1.0),
    "lambda_gn": ("#6e6e6e", 1.0),
    "critical_sharpness": ("#cc79a7", 1.0),
    "lambda_osc": ("#d55e00", 1.3),
    "batch_sharpness": ("#009e73", 1.6),
    "step_sharpness": ("#d55e00", 0.8),
}
ALARM, INK = "#c8102e", "#333333"
# Of a figure, in inches; the legend stands in the right margin, so that all figures have one scale of steps.
WIDTH, LEFT, RIGHT, TOP, BOTTOM, GAP = 8.4, 0.72, 2.05, 0.34, 0.5, 0.42
_WRAP = 21
DASHES = ("--", ":", "-.")  # of edges in one frame
# Curves whose positive values span this factor have a logarithmic axis.
_SPAN = 100.0
# The frame holds this share of the points, and all edges; the others are marked at its rim.
_FRAMED = 0.98


def colour(number: int) -> str:
    """Return the colour of the n-th line."""
    return COLOURS[number % len(COLOURS)]


def style_of(key: str, number: int) -> tuple[str, float]:
    """Return colour and width of a quantity, the n-th in its figure."""
    return _STYLES.get(key, (colour(number), 1.2))


def stacked(heights: Sequence[float]) -> tuple[Any, list[Any]]:
    """Return a figure, without pyplot, and frames of some heights, in inches, one below the other."""
    from matplotlib.figure import Figure

    total = TOP + sum(heights) + GAP * (len(heights) - 1) + BOTTOM
    figure, above, frames = Figure(figsize=(WIDTH, total), dpi=150), TOP, []
    for height in heights:
        place = (LEFT / WIDTH, 1.0 - (above + height) / total, 1.0 - (LEFT + RIGHT) / WIDTH, height / total)
        frames.append(figure.add_axes(place))
        above += height + GAP
    return figure, frames


def draw_points(axes: Any, points: Points, label: str, color: str, width: float, order: float = 2.0) -> None:
    """Draw a line with its band of errors; NaN leaves a gap in it, with a dot where a point is alone."""
    known = np.isfinite(points.values)
    alone = known & ~np.r_[False, known[:-1]] & ~np.r_[known[1:], False]
    every = len(points.steps) <= 40
    axes.plot(points.steps, points.values, color=color, linewidth=width, label=wrapped(label), zorder=order)
    dots = known if every else alone
    axes.plot(points.steps[dots], points.values[dots], ".", color=color, markersize=width + 3.0, zorder=order)
    if points.errors is not None:
        errors = np.where(np.isfinite(points.errors), points.errors, 0.0)
        low, high = points.values - errors, points.values + errors
        axes.fill_between(
            points.steps, low, high, where=np.isfinite(points.values), color=color, alpha=0.2, linewidth=0
        )


def frame(axes: Any, curves: Sequence[tuple[Points, str]], edges: Sequence[Points] = ()) -> None:
    """Choose scale and limits of the values, and mark the points beyond: ▲▼ at the rim, | where a value is NaN."""
    finite = np.concatenate([points.finite.values for points, _ in curves] or [np.empty(0)])
    lines = np.concatenate([points.finite.values for points in edges] or [np.empty(0)])
    if not finite.size:
        return
    low, high = np.quantile(finite, ((1.0 - _FRAMED) / 2.0, (1.0 + _FRAMED) / 2.0))
    # A frame that few points would stretch is left to the others; else all are in it.
    whole, spread = (finite.min(), finite.max()), high - low
    low = whole[0] if low - whole[0] <= spread else low
    high = whole[1] if whole[1] - high <= spread else high
    low, high = min(low, lines.min(initial=low)), max(high, lines.max(initial=high))
    positive = finite[finite > 0.0]
    logarithmic = positive.size == finite.size and high > _SPAN * max(low, np.finfo(float).tiny)
    if logarithmic:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.3, high * 1.3)
    else:
        room = 0.07 * (high - low) or 0.1 * abs(high) or 1.0
        axes.set_ylim(0.0 if 0.0 <= low < 0.25 * high else low - room, high + room)
    bottom, top = axes.get_ylim()
    rim = {"transform": axes.get_xaxis_transform(), "clip_on": False, "linestyle": "none", "zorder": 5}
    for points, color in curves:
        for place, sign, beyond in ((1.0, "^", points.values > top), (0.0, "v", points.values < bottom)):
            axes.plot(points.steps[beyond], np.full(beyond.sum(), place), sign, color=color, markersize=4.5, **rim)
        missing = points.steps[np.isnan(points.values)]
        axes.plot(missing, np.full(missing.size, 0.015), "|", color=color, markersize=4, alpha=0.5, **rim)


def draw_edge(axes: Any, points: Points, label: str, dashes: str) -> None:
    """Draw an edge that may move."""
    axes.plot(
        points.steps, points.values, color="black", linestyle=dashes, linewidth=1.2, label=wrapped(label), zorder=3
    )


def tidy(axes: Any, steps: tuple[float, float], title: str = "", last: bool = True) -> None:
    """Draw a pale grid, a frame along the scales only, and one scale of steps."""
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#888888")
    axes.tick_params(colors=INK, labelsize=9)
    room = 0.01 * (steps[1] - steps[0]) or 0.5
    axes.set_xlim(steps[0] - room, steps[1] + room)
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.tick_params(labelbottom=last)
    if last:
        axes.set_xlabel("optimizer step", fontsize=9.5, color=INK)


def legend(axes: Any, **handles: Any) -> None:
    """Put the legend to the right of the frame, where it hides nothing."""
    place = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.04)}
    axes.legend(**place, **handles, frameon=False, fontsize=8.8, handlelength=1.5, labelcolor=INK)


def wrapped(label: str) -> str:
    """Return a label that the margin holds; its own lines stay."""
    return "\n".join(textwrap.fill(line, _WRAP) for line in label.splitlines())
