"""Pictures of values with their errors and edges: of one measurement, and of several over the steps."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_curvature.reporting.pictures import new_figure

_EDGE = {"color": "tab:red", "linestyle": "--", "linewidth": 1.2}
# Values that are all positive and span more than this have a logarithmic axis.
_WIDE = 30.0


def draw_points(values: Mapping[str, float], errors: Mapping[str, float], edges: Mapping[str, float]) -> Any | None:
    """Return a figure of values with error bars and their edges, a line for each; None without matplotlib."""
    finite = {key: value for key, value in values.items() if math.isfinite(value)}
    figure = new_figure(figsize=(6.4, 1.1 + 0.34 * max(len(finite), 1)), dpi=110)
    if figure is None:
        return None
    axes = figure.add_subplot()
    for place, (key, value) in enumerate(finite.items()):
        error = errors.get(key, math.nan)
        axes.errorbar(value, place, xerr=error if error > 0.0 else None, fmt="o", color="C0", markersize=4, capsize=3)
        if math.isfinite(edge := edges.get(key, math.nan)):
            axes.plot([edge, edge], [place - 0.35, place + 0.35], label="edge", **_EDGE)
    axes.set_yticks(range(len(finite)), finite, fontsize=8)
    axes.set_ylim(len(finite) - 0.5, -0.5)
    _scale(axes, "x", [*finite.values(), *(edges[key] for key in finite if key in edges)])
    _finish(axes)
    return figure


def draw_curves(
    steps: Sequence[int],
    values: Mapping[str, Sequence[float]],
    errors: Mapping[str, Sequence[float]],
    edges: Mapping[str, Sequence[float]],
) -> Any | None:
    """Return a figure of values over the steps, a panel for each, with bands of errors and their edges, as columns.

    None without matplotlib.
    """
    height = math.ceil(len(values) / 3) or 1
    width = math.ceil(len(values) / height) or 1
    figure = new_figure(figsize=(0.4 + 3.4 * width, 0.4 + 2.5 * height), dpi=110)
    if figure is None:
        return None
    panels = iter(figure.subplots(height, width, squeeze=False).flat)
    for axes, (key, column) in zip(panels, values.items(), strict=False):
        error = [e if math.isfinite(e) else 0.0 for e in errors[key]]
        axes.plot(steps, column, "o-", color="C0", markersize=3, linewidth=1.2)
        low, high = ([v + sign * e for v, e in zip(column, error, strict=True)] for sign in (-1.0, 1.0))
        axes.fill_between(steps, low, high, color="C0", alpha=0.25, linewidth=0.0)
        edge = [one if math.isfinite(one) else math.nan for one in edges[key]]
        if not all(map(math.isnan, edge)):
            axes.plot(steps, edge, label="edge", **_EDGE)
        _scale(axes, "y", [*column, *edge])
        axes.set_title(key, fontsize=9)
        axes.xaxis.get_major_locator().set_params(integer=True)
        _finish(axes)
    for axes in panels:  # those that are left over
        axes.remove()
    figure.supxlabel("optimizer step", fontsize=9)
    return figure


def _scale(axes: Any, axis: str, numbers: Sequence[float]) -> None:
    known = [number for number in numbers if math.isfinite(number)]
    if known and min(known) > 0.0 and max(known) > _WIDE * min(known):
        getattr(axes, f"set_{axis}scale")("log")


def _finish(axes: Any) -> None:
    labels = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    if labels:
        axes.legend(labels.values(), labels.keys(), frameon=False, fontsize=7)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
