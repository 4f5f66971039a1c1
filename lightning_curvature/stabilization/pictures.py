"""The picture of a stabilization result: its criteria against k."""

import math
from collections.abc import Mapping
from typing import Any

from lightning_curvature.functional import DecaySlope
from lightning_curvature.reporting.pictures import new_figure

# Criterion, estimator, D and σ of a curve; its rows by k.
Curve = tuple[str, str, int, float]
Curves = Mapping[Curve, Mapping[int, Any]]

_LABELS = {"delta_1": "Δ₁", "delta_2": "Δ₂", "delta_2_subspace": "Δ₂ in the subspace"}
_MARKERS = {"direct": "o", "quadratic": "s", "gaussian_moment": "^", "exact": "."}


def draw_curves(curves: Curves, slopes: Mapping[Curve, DecaySlope], title: str) -> Any:
    """Return a matplotlib figure of all curves, a panel for each σ; None without matplotlib."""
    sigmas = sorted({sigma for *_, sigma in curves if sigma}) or [0.0]
    figure = new_figure(figsize=(1.6 + 4.6 * len(sigmas), 4.6), dpi=110)
    if figure is None:
        return None
    figure.suptitle(title, fontsize=11)
    panels = figure.subplots(1, len(sigmas), squeeze=False, sharey=True)[0]
    for axes, sigma in zip(panels, sigmas, strict=True):
        _draw_panel(axes, curves, slopes, sigma)
    panels[0].set_ylabel("criterion")
    return figure


def _draw_panel(axes: Any, curves: Curves, slopes: Mapping[Curve, DecaySlope], sigma: float) -> None:
    """Draw all curves of one σ: a line for the first estimator of each, marks for the others."""
    lines = set[tuple[str, int]]()
    for name, curve in curves.items():
        criterion, estimator, dimension, curve_sigma = name
        if curve_sigma not in (0.0, sigma):
            continue
        rows = [row for row in curve.values() if row.value > 0.0]
        # An error that is not known (of one new sample) is left out.
        errors = [math.hypot(*(e for e in (r.stderr_samples, r.stderr_draws) if not math.isnan(e))) for r in rows]
        at_point, first = criterion == "delta_1", (criterion, dimension) not in lines
        lines.add((criterion, dimension))
        label = f"{_LABELS.get(criterion, criterion)}{f', D = {dimension:,}' * bool(dimension)}"
        axes.errorbar(
            [row.k + 1 for row in rows],
            [row.value for row in rows],
            [min(error, 0.9 * row.value) for error, row in zip(errors, rows, strict=True)],
            label=f"{label}: slope {slopes[name].slope:.2f}" if first else f"… {estimator.replace('_', ' ')}",
            color="black" if at_point else f"C{len(lines) % 10}",
            marker=_MARKERS[estimator],
            markersize=4,
            linestyle="none" if not first else "--" if at_point else "-",
            linewidth=1.2,
            elinewidth=0.8,
        )
    axes.set(xscale="log", yscale="log", xlabel="k + 1 samples")
    sizes = sorted({k + 1 for curve in curves.values() for k in curve})
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    if sigma:
        axes.set_title(f"σ = {sigma:g}", fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=7, loc="lower left")
