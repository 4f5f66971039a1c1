"""Curves kept in memory while a run logs them, what they say in numbers, and their picture."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from lightning.pytorch.loggers.logger import Logger

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Curve = tuple[np.ndarray, np.ndarray]  # steps, values

# A run counts as having reached the edge once its reference curvature first exceeds this share of 2/η.
EDGE_SHARE = 0.9

LABELS = {
    "lambda_dir": r"$\lambda_{\mathrm{dir}}$  (exact, one HVP)",
    "lambda_fd": r"$\lambda_{\mathrm{FD}}$  (two forwards)",
    "lambda_kl": r"$\lambda_{\mathrm{KL}}$  (one forward)",
    "lambda_gn": r"$\lambda_{\mathrm{GN}}$  (Gauss–Newton)",
    "critical_sharpness": "critical sharpness",
}


class CurveLogger(Logger):
    """A Lightning logger that keeps every scalar it is given, for pictures and tables at the end of a script."""

    def __init__(self) -> None:
        super().__init__()
        self._points: dict[str, dict[int, float]] = {}

    @property
    def name(self) -> str:
        """Name of the logger; nothing is written under it."""
        return "curves"

    @property
    def version(self) -> str:
        """Version of the logger; nothing is written under it."""
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Hyperparameters are not curves."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Keep the values of one step."""
        for key, value in metrics.items():
            self._points.setdefault(key, {})[step or 0] = float(value)

    def curve(self, key: str) -> Curve:
        """Steps and values logged under ``key``, in order of steps."""
        points = sorted(self._points.get(key, {}).items())
        return np.array([step for step, _ in points], dtype=int), np.array([value for _, value in points])


@dataclass(frozen=True)
class Run:
    """One optimizer's run, as the picture and the table need it.

    Attributes:
        title: the optimizer's name.
        learning_rate: η.
        loss: training loss.
        curvature: λ by its key, e.g. "lambda_kl", in the order to be shown; the first is the reference.
    """

    title: str
    learning_rate: float
    loss: Curve
    curvature: dict[str, Curve]

    @property
    def edge(self) -> float:
        """The boundary 2/η."""
        return 2 / self.learning_rate

    def edge_step(self) -> int | None:
        """First measured step at which the reference exceeds ``EDGE_SHARE`` of 2/η; None if it never does."""
        steps, values = next(iter(self.curvature.values()))
        above = np.flatnonzero(values > EDGE_SHARE * self.edge)  # NaN compares as False.
        return int(steps[above[0]]) if above.size else None

    def plateau(self, key: str) -> np.ndarray:
        """λη/2 under ``key`` from the edge step on, without the steps at which it is undefined (NaN)."""
        start = self.edge_step()
        steps, values = self.curvature[key]
        plateau = values[steps >= start] / self.edge if start is not None else np.empty(0)
        return plateau[np.isfinite(plateau)]


def table(runs: list[Run]) -> str:
    """Mean and median of λη/2 on the plateau, per run and estimator; 1 is the edge of stability."""
    lines = [
        f"λη/2 on the plateau: all steps from the first where the reference λ exceeds {EDGE_SHARE} of 2/η.",
        "1 is the edge of stability. Where gᵀΔθ is close to 0 the ratio is large: the median does not mind.",
        f"{'optimizer':<10} {'η':>8} {'estimator':<20} {'mean':>8} {'median':>8}   {'from step':<11} {'final loss'}",
    ]
    for run in runs:
        for key in run.curvature:
            plateau, start = run.plateau(key), run.edge_step()
            mean, median = (f"{f(plateau):.3f}" if plateau.size else "–" for f in (np.mean, np.median))
            reached = "not reached" if start is None else str(start)
            lines.append(
                f"{run.title:<10} {run.learning_rate:>8.3g} {key:<20} {mean:>8} {median:>8}   {reached:<11} "
                f"{run.loss[1][-1]:>10.4f}"
            )
    return "\n".join(lines)


def draw(runs: list[Run], path: Path) -> None:
    """Write the picture to ``path``: one column a run, one row an estimator, 2/η dashed, the training loss below."""
    keys = list(runs[0].curvature)
    rows = len(keys) + 1
    figure, axes = plt.subplots(
        rows, len(runs), figsize=(4.8 * len(runs), 1.6 * rows + 0.6), sharex="col", squeeze=False, layout="constrained"
    )
    for column, run in zip(axes.T, runs, strict=True):
        column[0].set_title(f"{run.title},  η = {run.learning_rate:g}")
        for axis, key, colour in zip(column[:-1], keys, plt.cm.tab10.colors, strict=False):
            steps, values = run.curvature[key]
            axis.plot(steps, values, color=colour, linewidth=1)
            axis.axhline(run.edge, color="black", linestyle="--", linewidth=1, label=f"2/η = {run.edge:g}")
            # A step with gᵀΔθ close to 0 sends λ far away; the band around the edge is what there is to see.
            axis.set_ylim(-0.15 * run.edge, 2 * run.edge)
            axis.set_ylabel(LABELS.get(key, key).replace("  ", "\n"))
        column[0].legend(loc="upper left", frameon=False)
        column[-1].plot(*run.loss, color="dimgray", linewidth=1)
        column[-1].set_ylabel("training loss")
        column[-1].set_xlabel("step")
        for axis in column:
            axis.grid(alpha=0.25)
            axis.margins(x=0.01)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
