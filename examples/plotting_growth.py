"""The picture of stabilization: decay with k, subspace against full space, estimators against the number of draws."""

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.ticker import NullLocator, ScalarFormatter
from plotting import tidy

from lightning_curvature import CriterionRow, SampleGrowth

COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:purple")
ESTIMATORS = {"direct": ("o", "direct Monte Carlo"), "quadratic": ("s", "quadratic Monte Carlo")}


def _curve(
    growth: SampleGrowth, criterion: str, estimator: str, dimension: int | None, sigma: float
) -> list[CriterionRow]:
    return [
        row
        for row in growth.rows
        if (row.criterion, row.estimator, row.sigma) == (criterion, estimator, sigma)
        and dimension in (None, row.dimension)
    ]


def draw(growth: SampleGrowth, by_draws: dict[int, SampleGrowth], path: Path, *, subject: str) -> None:
    """Write the picture to ``path``.

    Args:
        growth: result with all k, D and σ.
        by_draws: results of one k, D and σ with increasing numbers of draws.
        path: PNG.
        subject: network and data, for the title.
    """
    sigmas = sorted({row.sigma for row in growth.rows if row.sigma})
    dimensions = sorted({row.dimension for row in growth.rows if row.criterion == "delta_2_subspace"})
    figure = plt.figure(figsize=(11.5, 9.2), layout="constrained")
    figure.suptitle(f"What one more sample changes in the loss\n{subject}", fontsize=13, linespacing=1.5)
    (decay, ratio), (share, estimators) = figure.subplots(2, 2)
    _draw_decay(decay, growth, sigmas[-1], dimensions)
    _draw_ratio(ratio, growth, sigmas, dimensions)
    _draw_shares(share, growth, sigmas, dimensions)
    _draw_estimators(estimators, by_draws)
    for axis in (decay, ratio, share, estimators):
        tidy(axis)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _draw_decay(axis: plt.Axes, growth: SampleGrowth, sigma: float, dimensions: list[int]) -> None:
    slopes = growth.slopes()
    point = _curve(growth, "delta_1", "exact", None, 0.0)
    full = _curve(growth, "delta_2", "direct", None, sigma)
    series = [("Δ₁ at the parameters", "black", point), ("Δ₂ in all directions", "tab:red", full)]
    for color, dimension in zip(COLORS, dimensions, strict=False):
        rows = _curve(growth, "delta_2_subspace", "direct", dimension, sigma)
        series.append((f"Δ₂ in the {dimension} sharpest" if dimension > 1 else "Δ₂ in the sharpest", color, rows))
    for label, color, rows in series:
        sizes, values = [row.k + 1 for row in rows], [row.value for row in rows]
        errors = [min(row.stderr_samples, 0.9 * row.value) for row in rows]
        axis.errorbar(
            sizes, values, errors, color=color, marker="o", markersize=3, linewidth=1.3, elinewidth=0.8,
            label=f"{label}, slope {slopes[rows[0].curve].slope:.2f}",
        )  # fmt: skip
    axis.set(xscale="log", yscale="log", xlabel="samples k + 1", ylabel="criterion")
    axis.set_title(f"Decay, σ = {sigma:g} (± over new samples)", fontsize=10)
    _plain_ticks(axis, [row.k + 1 for row in point])
    axis.legend(frameon=False, fontsize=8)


def _draw_ratio(axis: plt.Axes, growth: SampleGrowth, sigmas: list[float], dimensions: list[int]) -> None:
    for style, sigma in zip(("-", "--", ":", "-."), sigmas, strict=False):
        full = {row.k: row.value for row in _curve(growth, "delta_2", "direct", None, sigma)}
        for color, dimension in zip(COLORS, dimensions, strict=False):
            rows = _curve(growth, "delta_2_subspace", "direct", dimension, sigma)
            sizes, values = [row.k + 1 for row in rows], [row.value / full[row.k] for row in rows]
            axis.plot(sizes, values, style, color=color, linewidth=1.4, label=f"σ = {sigma:g}, D = {dimension}")
    axis.axhline(1.0, color="black", linewidth=0.8)
    axis.set(xscale="log", xlabel="samples k + 1", ylabel="Δ₂ of the subspace / Δ₂ of the full space")
    axis.set_title("A few directions against all of them, direct Monte Carlo", fontsize=10)
    _plain_ticks(axis, [row.k + 1 for row in growth.rows if row.criterion == "delta_1"])
    axis.margins(y=0.22)
    axis.legend(frameon=False, fontsize=7, ncols=len(sigmas), loc="upper center", columnspacing=1.0)


def shares(growth: SampleGrowth, dimension: int, sigma: float) -> dict[int, float]:
    """Return by k the mean square of f − f(w) in the subspace over that in all directions, by the closed form."""
    full = {row.k: row.deformation for row in _curve(growth, "delta_2", "gaussian_moment", None, sigma)}
    rows = _curve(growth, "delta_2_subspace", "gaussian_moment", dimension, sigma)
    return {row.k: row.deformation / full[row.k] for row in rows}


def _draw_shares(axis: plt.Axes, growth: SampleGrowth, sigmas: list[float], dimensions: list[int]) -> None:
    sigma = sigmas[0]
    for color, dimension in zip(COLORS, dimensions, strict=False):
        found = shares(growth, dimension, sigma)
        axis.plot(
            [k + 1 for k in found], list(found.values()), "-o", color=color, markersize=3, label=f"D = {dimension}"
        )
    axis.set(xscale="log", xlabel="samples k + 1", ylabel="share in the subspace")
    axis.set_title(f"Deformation E(f − f(w))² alone, closed form, σ = {sigma:g}", fontsize=10)
    _plain_ticks(axis, sorted({row.k + 1 for row in growth.rows}))
    axis.legend(frameon=False, fontsize=8)


def _draw_estimators(axis: plt.Axes, by_draws: dict[int, SampleGrowth]) -> None:
    draws = sorted(by_draws)
    exact = next(row for row in by_draws[draws[0]].rows if row.estimator == "gaussian_moment")
    for offset, (name, (marker, label)) in zip((0.96, 1.04), ESTIMATORS.items(), strict=True):
        rows = [next(row for row in by_draws[count].rows if row.estimator == name) for count in draws]
        axis.errorbar(
            [count * offset for count in draws],
            [row.value / exact.value for row in rows],
            [2.0 * row.stderr_draws / exact.value for row in rows],
            marker=marker,
            markersize=4,
            linewidth=0,
            elinewidth=1.2,
            label=f"{label} (± 2 standard errors)",
        )
    axis.axhline(1.0, color="black", linewidth=0.8, label="closed form")
    axis.set(xscale="log", xlabel="draws S", ylabel="value / closed form")
    axis.set_title(f"Estimators, k = {exact.k}, D = {exact.dimension}, σ = {exact.sigma:g}", fontsize=10)
    _plain_ticks(axis, draws)
    axis.legend(frameon=False, fontsize=8, loc="lower right")


def _plain_ticks(axis: plt.Axes, places: list[int]) -> None:
    """Numbers as they are at the places that were measured."""
    axis.set_xticks(places)
    axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.xaxis.set_minor_locator(NullLocator())
