"""Table and picture of the stability index."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from curves import Curve
from plotting import plt, share_steps, tidy
from plotting_sharpness import Run


@dataclass(frozen=True)
class Index:
    """The stability index of a run, with its standard error and its two terms."""

    value: Curve
    error: Curve
    drift: Curve
    noise: Curve


def index_table(index: Index, run: Run) -> str:
    """Index, and two other indicators as shares of 2/η, over the last quarter of each phase."""
    lines = [
        "Medians over the last quarter of each phase. 1 is the edge in mean square; batch sharpness and λ_max as"
        " shares of 2/η.",
        f"{'from step':<11}{'η':>8}{'b':>6}{'index':>9}{'drift':>9}{'noise':>9}{'batch sharpness':>18}{'λ_max':>9}",
    ]
    ends = [*(phase.start for phase in run.phases[1:]), run.steps]
    for phase, end in zip(run.phases, ends, strict=True):
        first = phase.start + 0.75 * (end - phase.start)

        def late(curve: Curve, first: float = first, end: int = end) -> float:
            steps, values = curve
            chosen = values[(steps >= first) & (steps < end) & np.isfinite(values)]
            return float(np.median(chosen)) if chosen.size else np.nan

        others = [late(run.curvature[key]) / phase.edge for key in ("batch_sharpness", "lambda_max")]
        numbers = [late(curve) for curve in (index.value, index.drift, index.noise)]
        lines.append(
            f"{phase.start:<11}{phase.learning_rate:>8.3g}{phase.batch_size:>6}"
            + "".join(f"{number:>9.2f}" for number in numbers)
            + f"{others[0]:>18.2f}{others[1]:>9.2f}"
        )
    return "\n".join(lines)


def draw_index(index: Index, run: Run, path: Path, *, subject: str) -> None:
    """Write the picture: the index with its terms over the loss; dotted lines where something was changed."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8.4, 6.2), height_ratios=[2, 1], layout="constrained")
    figure.suptitle(f"Stability in the mean square\n{subject}", fontsize=12)
    steps, values = index.value
    error = index.error[1]
    top.fill_between(steps, values - error, values + error, color="#009e73", alpha=0.22, linewidth=0)
    top.plot(steps, values, color="#009e73", linewidth=1.8, label="stability index ± standard error")
    top.plot(*index.drift, color="#1b3a6b", linewidth=0.9, label="its drift")
    top.plot(*index.noise, color="#e69f00", linewidth=0.9, label="its noise")
    top.axhline(1.0, color="black", linestyle="--", linewidth=1.2, label="edge in mean square")
    top.set_ylim(0.0, min(4.0, max(1.3, 1.2 * float(np.nanmax(values, initial=1.0)))))
    top.set_ylabel("share of the edge")
    top.legend(frameon=False, fontsize=9, ncols=2)
    bottom.plot(*run.loss, color="dimgray", linewidth=1)
    bottom.set_ylabel("training loss")
    for axis in (top, bottom):
        for phase in run.phases[1:]:
            axis.axvline(phase.start, color="gray", linestyle=":", linewidth=1.2)
        tidy(axis)
    share_steps(run.steps, top, bottom)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
