"""Pictures of the noise against the curvature: power laws, their change in training, matrices, suppression."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LogNorm
from plotting import tidy
from torch import Tensor

from lightning_curvature import NoiseCurvature
from lightning_curvature.functional.noise import PowerLaw, coupling_matrix, power_law

COLORS = {"ce": "tab:blue", "mse": "tab:orange"}
NAMES = {"ce": "cross-entropy", "mse": "squared error"}
# Directions of the matrices: more are hard to see.
SHOWN = 50
Histories = dict[str, list[tuple[int, NoiseCurvature]]]


def draw(histories: Histories, path: Path, *, subject: str) -> None:
    """Write a picture of runs by loss, each a list of steps with their results, to ``path``."""
    figure = plt.figure(figsize=(13.0, 8.4), layout="constrained")
    figure.suptitle(f"SGD noise against curvature\n{subject}", fontsize=13, linespacing=1.5)
    (empirical, duality, training), matrices = figure.subplots(2, 3)
    for loss, history in histories.items():
        last = history[-1][1]
        _draw_law(empirical, last.gamma, last.curvatures, last.variances, COLORS[loss], NAMES[loss])
        if last.second_moments is not None:
            _draw_law(duality, last.gamma_awd, last.curvatures, last.second_moments, COLORS[loss], NAMES[loss])
        _draw_training(training, history, loss)
    for axes, name in ((empirical, "measured: $C_{ii}$"), (duality, "by duality: $2b\\,C_{ii}/\\sigma_w^2$")):
        _draw_slopes(axes)
        axes.set(xscale="log", yscale="log", xlabel="$H_{ii}$, about its middle", title=name)
        tidy(axes)
        axes.legend(frameon=False, fontsize=8)
    training.set(xlabel="optimizer step", ylabel="γ", title="in training")
    training.axhspan(1.0, 2.0, color="grey", alpha=0.12, linewidth=0)
    training.set_xscale("symlog", linthresh=100)
    tidy(training)
    training.legend(frameon=False, fontsize=8)
    first = next(iter(histories))
    _draw_matrices(figure, matrices, histories[first][-1][1], NAMES[first])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_law(axes: plt.Axes, law: PowerLaw | None, curvatures: Tensor, heights: Tensor, color: str, name: str) -> None:
    """Points and line about their middle, so that slopes can be compared."""
    if law is None:
        return
    used = (curvatures >= law.lowest) & (curvatures <= law.highest) & (heights > 0.0)
    x, y = np.log(curvatures[used].numpy()), np.log(heights[used].numpy())
    middle = x.mean()
    height = law.log_factor + law.exponent * middle
    axes.scatter(np.exp(x - middle), np.exp(y - height), s=4, alpha=0.3, color=color, linewidths=0)
    ends = np.array([x.min(), x.max()]) - middle
    axes.plot(np.exp(ends), np.exp(law.exponent * ends), color=color, label=f"{name}: γ = {law.exponent:.2f}")


def _draw_slopes(axes: plt.Axes) -> None:
    low, high = axes.dataLim.x0, axes.dataLim.x1
    if not 0.0 < low < high:
        return
    ends = np.array([low, high])
    axes.plot(ends, ends, ":", color="grey", linewidth=1.0, label="slope 1")
    # As far as the frame reaches without it.
    short = np.clip(ends, low**0.5, high**0.5)
    axes.plot(short, short**2, "--", color="grey", linewidth=1.0, label="slope 2")


def _draw_training(axes: plt.Axes, history: list[tuple[int, NoiseCurvature]], loss: str) -> None:
    for name, style, law_of in (
        ("measured", "o-", lambda r: r.gamma),
        ("duality", "s--", lambda r: r.gamma_awd),
        ("duality, raw", "^:", lambda r: r.chain["raw"].gamma if "raw" in r.chain else None),
    ):
        points = [(step, law.exponent) for step, r in history if (law := law_of(r)) is not None]
        if points:
            axes.plot(
                *zip(*points, strict=True), style, color=COLORS[loss], markersize=4, label=f"{NAMES[loss]}, {name}"
            )


def _draw_matrices(figure: Any, panels: Any, result: NoiseCurvature, name: str) -> None:
    shown = result.shown[:SHOWN, :SHOWN].abs().numpy()
    top = shown.max() or 1.0
    image = panels[0].imshow(np.maximum(shown, 1e-4 * top), cmap="magma", norm=LogNorm(1e-4 * top, top))
    panels[0].set_title(f"{name}: $|C_{{ij}}|$ in H's eigenvectors")
    figure.colorbar(image, ax=panels[0], shrink=0.8)
    for axes, matrix, title in (
        (panels[1], result.shown, "coupling $|R_{ij}|$"),
        (panels[2], result.shown_random, "of rotated noise"),
    ):
        if matrix is None:
            axes.axis("off")
            continue
        coupling = coupling_matrix(matrix[:SHOWN, :SHOWN]).abs().numpy()
        off = coupling[~np.eye(len(coupling), dtype=bool)]
        image = axes.imshow(coupling, cmap="Reds", vmin=0.0, vmax=1.0)
        axes.set_title(f"{title}, mean {np.nanmean(off):.3f}")
        figure.colorbar(image, ax=axes, shrink=0.8)


def draw_suppression(
    experiments: dict[str, dict[str, tuple[Tensor, Tensor]]], shares: dict[str, Tensor], path: Path, *, subject: str
) -> None:
    """Write a picture of C_ii against H_ii from changed spectra of single samples: a row for each loss.

    The last column shows the share of C_ii that the first k eigenvalues of all samples contribute: a line for each
    direction, and their mean.
    """
    columns = 1 + max(len(experiment) for experiment in experiments.values())
    figure = plt.figure(figsize=(3.4 * columns, 3.3 * len(experiments) + 0.7), layout="constrained")
    figure.suptitle(f"What the largest eigenvalues of single samples account for\n{subject}", fontsize=12)
    panels = figure.subplots(len(experiments), columns, squeeze=False)
    for line, (loss, experiment) in zip(panels, experiments.items(), strict=True):
        for axes, (how, (curvatures, variances)) in zip(line[:-1], experiment.items(), strict=True):
            used = (curvatures > 0.0) & (variances > 0.0)
            exponent = power_law(curvatures, variances).exponent
            axes.scatter(curvatures[used], variances[used], s=4, alpha=0.4, color=COLORS[loss], linewidths=0)
            axes.set(xscale="log", yscale="log", xlabel="$H_{ii}$")
            axes.set_title(f"{how}: γ = {exponent:.2f}", fontsize=9)
            tidy(axes)
        line[0].set_ylabel(f"{NAMES[loss]}\n$2b\\,C_{{ii}}/\\sigma_w^2$")
        share = shares[loss].numpy()
        numbers = np.arange(1, len(share) + 1)
        line[-1].plot(numbers, share, color=COLORS[loss], alpha=0.1, linewidth=0.5)
        line[-1].plot(numbers, np.nanmean(share, axis=1), "k--")
        line[-1].set(xlabel="k", ylim=(0.0, 1.05))
        line[-1].set_title("share of the first k in $C_{ii}$", fontsize=9)
        tidy(line[-1])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
