"""The figures of values by module: how they move, and the last ones."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_curvature.report.series import Points, Series, symbol
from lightning_curvature.report.style import INK, WIDTH, colour

# More names than this cannot be read: those with the largest values are drawn.
_DRAWN = 20
_TITLES = {
    "hessian_trace": "trace of the diagonal block",
    "lambda_dir": "terms of λ_dir",
    "batch_sharpness": "terms of batch sharpness",
    "descent": "terms of gᵀΔθ",
}


def draw_modules(runs: Sequence[Series]) -> list[Any]:
    """Return a figure a key: one row a run, a map of module and step beside the bars of the last step."""
    keys = list(dict.fromkeys(key for one in runs for key in one.modules))
    return [_draw_key(key, [one for one in runs if key in one.modules], len(runs) > 1) for key in keys]


def _title(key: str) -> str:
    eigenvalue = key.removesuffix("_share")
    return f"share of the module in the eigenvector of {symbol(eigenvalue)}" if eigenvalue != key else symbol(key)


def _draw_key(key: str, runs: Sequence[Series], named: bool) -> Any:
    from matplotlib.figure import Figure

    chosen = [_largest(one.modules[key]) for one in runs]
    heights = [0.9 + 0.23 * len(modules) for modules in chosen]
    figure = Figure(figsize=(WIDTH, 0.3 + sum(heights)), layout="constrained", dpi=150)
    rows = figure.subplots(len(runs), 2, squeeze=False, width_ratios=[2.4, 1], height_ratios=heights)
    for (left, right), one, modules in zip(rows, runs, chosen, strict=True):
        _draw_map(figure, left, modules)
        _draw_last(right, modules)
        title = _TITLES.get(key, _title(key))
        count = len(one.modules[key])
        some = f", {len(modules)} of {count} modules" if count > len(modules) else ""
        left.set_title(f"{title}{some}" + (f" · {one.run.name}" if named else ""), loc="left", fontsize=10, color=INK)
    return figure


def _largest(modules: dict[str, Points] | Any) -> dict[str, Points]:
    """Return the modules with the largest values, in the order of the network."""
    sizes = {name: float(np.max(np.abs(points.finite.values), initial=0.0)) for name, points in modules.items()}
    kept = set(sorted(sizes, key=lambda name: -sizes[name])[:_DRAWN])
    return {name: points for name, points in modules.items() if name in kept}


def _draw_map(figure: Any, axes: Any, modules: dict[str, Points]) -> None:
    steps = np.unique(np.concatenate([points.steps for points in modules.values()]))
    table = np.full((len(modules), len(steps)), np.nan)
    for row, points in enumerate(modules.values()):
        table[row, np.searchsorted(steps, points.steps)] = np.where(np.isfinite(points.values), points.values, np.nan)
    known = table[np.isfinite(table)]
    if known.size:
        # Signs show as two colours.
        most = float(np.quantile(np.abs(known), 0.99)) or 1.0
        signed = known.min() < 0.0
        least, colours = (-most, "PuOr_r") if signed else (0.0, "Blues")
        right = steps[-1] + (steps[-1] - steps[-2] if len(steps) > 1 else 1)
        mesh = axes.pcolormesh(
            np.r_[steps, right], np.arange(len(modules) + 1) - 0.5, table, cmap=colours, vmin=least, vmax=most
        )
        bar = figure.colorbar(mesh, ax=axes, pad=0.01, aspect=30, extend="both" if signed else "max")
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=8, colors=INK)
    axes.set_yticks(range(len(modules)), list(modules))
    axes.set_ylim(len(modules) - 0.5, -0.5)
    axes.tick_params(labelsize=8.5, colors=INK, length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("optimizer step", fontsize=9.5, color=INK)


def _draw_last(axes: Any, modules: dict[str, Points]) -> None:
    last = {name: points.finite for name, points in modules.items()}
    for row, points in enumerate(last.values()):
        if points.steps.size:
            error = None if points.errors is None or not np.isfinite(points.errors[-1]) else points.errors[-1]
            axes.barh(row, points.values[-1], 0.68, xerr=error, color=colour(4), ecolor=INK)
    axes.set_ylim(len(modules) - 0.5, -0.5)
    axes.set_yticks([])
    axes.axvline(0.0, color=INK, linewidth=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(labelsize=8.5, colors=INK)
    ends = {int(points.steps[-1]) for points in last.values() if points.steps.size}
    axes.set_title(f"step {max(ends)}" if ends else "", loc="left", fontsize=10, color=INK)
