"""The figures of a report, each from the series of one run or several."""

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lightning_curvature.functional.regime import REGIMES
from lightning_curvature.report.series import Points, Series, symbol
from lightning_curvature.report.style import (
    ALARM,
    BOTTOM,
    DASHES,
    INK,
    REGIME_COLOURS,
    colour,
    draw_edge,
    draw_points,
    frame,
    legend,
    stacked,
    style_of,
    tidy,
)

ONE = "1"  # an edge that no one logs
_MOST_LINES = 10
HEIGHT = 2.3  # of a frame, in inches


@dataclass(frozen=True)
class Panel:
    """Curves that share a frame.

    Attributes:
        title: over the frame.
        curves: their values, by key, of one run.
        edges: keys of edges, drawn dashed; ``"1"`` is the number.
    """

    title: str
    curves: Callable[[Series], dict[str, Points]]
    edges: tuple[str, ...] = ()


def panels(*wanted: Panel) -> Callable[[Sequence[Series]], list[Any]]:
    """Return the function that draws panels one below the other, those that have values.

    Several runs share a frame where it has no edges of their own; else each run has one, with its own scale.
    """

    def draw(runs: Sequence[Series]) -> list[Any]:
        frames: list[tuple[Panel, Sequence[Series], list[_Line]]] = []
        for panel in wanted:
            apart = panel.edges and panel.edges != (ONE,)
            groups = [[one] for one in runs] if apart else [list(runs)]
            frames += [(panel, group, lines) for group in groups if (lines := _lines(panel, group, runs))]
        if not frames:
            return []
        figure, all_axes = stacked([HEIGHT] * len(frames))
        steps = _steps(runs)
        for axes, (panel, group, lines) in zip(all_axes, frames, strict=True):
            _draw_panel(axes, panel, lines, group)
            of_run = f" · {group[0].run.name}" if len(group) < len(runs) else ""
            tidy(axes, steps, panel.title + of_run, last=axes is all_axes[-1])
            legend(axes)
        return [figure]

    return draw


class _Line(NamedTuple):
    points: Points
    label: str
    color: str
    width: float


def _lines(panel: Panel, group: Sequence[Series], runs: Sequence[Series]) -> list[_Line]:
    """Return the lines of a frame: all quantities of one run, the first one of each of several runs."""
    by_run = [{key: p for key, p in panel.curves(one).items() if np.isfinite(p.values).any()} for one in group]
    if len(group) == 1:
        first = list(by_run[0].items())[:_MOST_LINES]
        return [_Line(points, symbol(key), *style_of(key, i)) for i, (key, points) in enumerate(first)]
    lines = []
    for number, (one, curves) in enumerate(zip(group, by_run, strict=True)):
        for key in list(curves)[:1]:
            lines.append(_Line(curves[key], f"{one.run.name}\n{symbol(key)}", colour(number), 1.3))
    return lines


def _draw_panel(axes: Any, panel: Panel, lines: Sequence[_Line], group: Sequence[Series]) -> None:
    for line in lines:
        draw_points(axes, *line, order=2.5 - line.width / 10.0)  # thin lines over broad ones
    edges: list[Points] = []
    if panel.edges == (ONE,):
        edges = [Points(np.array([0]), np.array([1.0]))]
        axes.axhline(1.0, color="black", linestyle="--", linewidth=1.2, label="edge", zorder=3)
    elif panel.edges:
        having = [key for key in panel.edges if key in group[0].values]
        for key, dashes in zip(having, DASHES, strict=False):
            edges.append(group[0].values[key])
            draw_edge(axes, edges[-1], symbol(key), dashes)
    frame(axes, [(line.points, line.color) for line in lines], edges)


def _steps(runs: Sequence[Series]) -> tuple[float, float]:
    """Return the first and last step of all that is drawn: one scale for all figures."""
    steps = np.concatenate([points.steps for one in runs for points in (*one.values.values(), *one.losses.values())])
    return float(steps.min()), float(steps.max())


def draw_regimes(runs: Sequence[Series]) -> list[Any]:
    """Draw one strip a run, each stretch in the colour of its regime, with its alarms."""
    from matplotlib.patches import Patch

    having = [one for one in runs if "regime" in one.values and one.values["regime"].finite.steps.size]
    if not having:
        return []
    seen = sorted({int(number) for one in having for number in one.values["regime"].finite.values})
    figure, (axes,) = stacked([max(0.5 * len(having), 0.2 * len(seen) - BOTTOM)])
    for row, one in enumerate(having):
        points = one.values["regime"].finite
        starts = np.flatnonzero(np.r_[True, np.diff(points.values) != 0.0])
        ends = np.r_[points.steps[starts[1:]], points.steps[-1] + 1]
        for start, end in zip(starts, ends, strict=True):
            number = int(points.values[start])
            axes.barh(
                row, end - points.steps[start], 0.62, points.steps[start], color=REGIME_COLOURS[number], linewidth=0
            )
        alarms = one.values.get("regime_alarm")
        if alarms is not None:
            at = alarms.steps[alarms.values > 0.0]
            axes.plot(at, np.full(at.size, row - 0.42), "v", color=ALARM, markersize=6, label="_", clip_on=False)
        if len(runs) > 1:
            name = textwrap.shorten(one.run.name, 40, placeholder="…")
            axes.text(0.0, row - 0.36, name, transform=axes.get_yaxis_transform(), va="bottom", fontsize=9, color=INK)
    axes.set_yticks([])
    axes.set_ylim(len(having) - 0.5, -0.65)
    tidy(axes, _steps(runs))
    axes.grid(visible=False)
    axes.spines[["left"]].set_visible(False)
    patches = [Patch(color=REGIME_COLOURS[number], label=REGIMES[number]) for number in seen]
    axes.legend(
        handles=patches, loc="upper left", bbox_to_anchor=(1.01, 1.1), frameon=False, fontsize=9, handlelength=1.2
    )
    return [figure]


def draw_losses(runs: Sequence[Series]) -> list[Any]:
    """Draw the losses: training over validation where both were logged."""
    validation = ("val", "valid", "validation", "test")

    def part(wanted: bool) -> Callable[[Series], dict[str, Points]]:
        return lambda one: {
            name: points
            for name, points in one.losses.items()
            if (name.lower().replace("/", "_").split("_")[0] in validation) == wanted
        }

    return panels(Panel("training loss", part(False)), Panel("validation loss", part(True)))(runs)
