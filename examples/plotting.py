"""Table and picture of the edge-of-stability example."""

from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from curves import Curve

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# A run has reached the edge where the median of λ/threshold over the next PLATEAU_STEPS steps exceeds EDGE_SHARE. The
# median of a stretch, since a single step with gᵀΔθ close to 0 has a large λ that says nothing.
EDGE_SHARE = 0.9
PLATEAU_STEPS = 50

# Beyond this relative distance from λ_dir the table says what λ_KL and λ_GN leave out.
GAUSS_NEWTON_GAP = 0.05

COLUMNS = 3  # runs side by side before the picture goes on below

# λ_dir is drawn broad and pale, as the ground on which the estimators of it have to lie.
STYLES = {
    "lambda_dir": {"label": r"$\lambda_{\mathrm{dir}}$  exact", "color": "#8fc7ea", "linewidth": 4.5},
    "lambda_fd": {"label": r"$\lambda_{\mathrm{FD}}$  loss at θ ± εd", "color": "#e69f00", "linewidth": 2.0},
    "lambda_kl": {"label": r"$\lambda_{\mathrm{KL}}$  outputs at θ ± εd", "color": "#1b3a6b", "linewidth": 0.9},
    "lambda_gn": {"label": r"$\lambda_{\mathrm{GN}}$  Gauss–Newton", "color": "#009e73", "linewidth": 0.9},
    "critical_sharpness": {"label": "critical sharpness", "color": "#cc79a7", "linewidth": 0.9},
}


def first_step_at_edge(steps: np.ndarray, shares: np.ndarray, length: int = PLATEAU_STEPS) -> int | None:
    """Return the step from which a curvature, as a share of its threshold, is at the edge; None if it never is.

    The median of the next ``length`` steps decides.
    """
    steps, shares = steps[np.isfinite(shares)], shares[np.isfinite(shares)]
    for start in steps[steps + length <= steps.max(initial=0)]:
        stretch = shares[(steps >= start) & (steps <= start + length)]
        if np.median(stretch) > EDGE_SHARE:
            return int(start)
    return None


@dataclass(frozen=True)
class Run:
    """One optimizer's run, for the picture and the table.

    Attributes:
        title: the optimizer's name.
        learning_rate: η.
        loss: training loss.
        curvature: λ by its key, e.g. "lambda_kl", in the order of the picture; the first is the reference.
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
        """Measured step from which the reference is at the edge; None if it never is."""
        steps, values = next(iter(self.curvature.values()))
        return first_step_at_edge(steps, values / self.edge)

    def plateau(self, key: str) -> np.ndarray:
        """λη/2 under ``key`` from the edge step on, without the steps at which it is undefined (NaN)."""
        start = self.edge_step()
        steps, values = self.curvature[key]
        plateau = values[steps >= start] / self.edge if start is not None else np.empty(0)
        return plateau[np.isfinite(plateau)]


def table(runs: list[Run]) -> str:
    """Mean and median of λη/2 on the plateau, per run and estimator; 1 is the edge of stability."""
    lines = [
        f"λη/2 on the plateau, the steps from the first whose next {PLATEAU_STEPS} have a median above {EDGE_SHARE}; "
        "1 is the edge of stability.",
        f"{'optimizer':<10}{'η':>8}{'2/η':>11}  {'estimator':<19}{'mean':>7}{'median':>8}{'last':>8}   "
        f"{'from step':<13}{'final loss':>10}",
    ]
    for run in runs:
        for key, (_, values) in run.curvature.items():
            plateau, start = run.plateau(key), run.edge_step()
            finite = values[np.isfinite(values)] / run.edge
            mean, median = (f"{f(plateau):.3f}" if plateau.size else "–" for f in (np.mean, np.median))
            last = f"{finite[-1]:.3f}" if finite.size else "–"
            reached = "not reached" if start is None else str(start)
            lines.append(
                f"{run.title:<10}{run.learning_rate:>8.3g}{run.edge:>11.4g}  {key:<19}{mean:>7}{median:>8}{last:>8}   "
                f"{reached:<13}{run.loss[1][-1]:>10.3g}"
            )
    gaps = list(filter(None, (_gauss_newton_gap(run) for run in runs)))
    if gaps:
        lines.append(
            "λ_KL and λ_GN hold the Gauss–Newton part G of H = G + R only, and R lasts as long as the residuals:\n"
            f"their mean differs from that of λ_dir by {', '.join(gaps)}."
        )
    return "\n".join(lines)


def _gauss_newton_gap(run: Run) -> str | None:
    """Mean of a Gauss–Newton estimator against that of λ_dir on the plateau, where the two are apart."""
    own = [key for key in ("lambda_kl", "lambda_gn") if key in run.curvature]
    if not own or "lambda_dir" not in run.curvature or not run.plateau("lambda_dir").size:
        return None
    plateau = run.plateau(own[0])
    gap = np.mean(plateau) / np.mean(run.plateau("lambda_dir")) - 1 if plateau.size else 0.0
    return f"{gap:+.0%} ({run.title}, η = {run.learning_rate:g})" if abs(gap) > GAUSS_NEWTON_GAP else None


def draw(runs: list[Run], path: Path, *, subject: str, loss_label: str, log_loss: bool) -> None:
    """Write the picture to ``path``: one column a run, the curvatures over the loss.

    Args:
        runs: the runs.
        path: PNG.
        subject: network and data, for the title.
        loss_label: axis label of the loss.
        log_loss: whether the loss has a logarithmic axis.
    """
    columns = min(COLUMNS, len(runs))
    blocks = -(-len(runs) // columns)
    figure = plt.figure(figsize=(5.6 * columns + 0.4, 5.4 * blocks + 1.0), layout="constrained")
    figure.suptitle(
        f"Curvature along the optimizer's steps, and the edge of stability 2/η\n{subject}", fontsize=13, linespacing=1.5
    )
    rows = figure.subplots(2 * blocks, columns, squeeze=False, height_ratios=[1.9, 1] * blocks)
    for axis in rows.flat[2 * len(runs) :]:
        axis.set_visible(False)
    for number, run in enumerate(runs):
        top, column = 2 * (number // columns), number % columns
        _draw_run(run, rows[top, column], rows[top + 1, column])
        rows[top + 1, column].set_yscale("log" if log_loss else "linear")
        if column == 0:
            rows[top, column].set_ylabel("curvature λ  (units of 1/η)")
            rows[top + 1, column].set_ylabel(loss_label)
    figure.align_ylabels(rows[:, 0])
    handles, labels = rows[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_run(run: Run, curvature: plt.Axes, loss: plt.Axes) -> None:
    for key, (steps, values) in run.curvature.items():
        curvature.plot(steps, values, solid_joinstyle="round", **STYLES[key])
    curvature.axhline(run.edge, color="black", linestyle="--", linewidth=1.3, label="2/η  edge of stability")
    # Undefined and very large values (gᵀΔθ close to 0) leave the frame: the band around the edge is what there is to
    # see.
    curvature.set_ylim(-0.12 * run.edge, 2 * run.edge)
    curvature.set_title(f"{run.title},  η = {run.learning_rate:.3g}")
    label_at_right(curvature, run.edge, f"2/η = {run.edge:.3g}")
    loss.plot(*run.loss, color="dimgray", linewidth=1)
    curvature.tick_params(labelbottom=False)
    share_steps(run.loss[0].max(initial=1), curvature, loss)
    for axis in (curvature, loss):
        tidy(axis)


def label_at_right(axis: plt.Axes, height: float, text: str) -> None:
    """Write ``text`` outside the frame, beside a horizontal line at ``height``."""
    right_of_axes = {"xycoords": ("axes fraction", "data"), "xytext": (4, 0), "textcoords": "offset points"}
    axis.annotate(text, (1.0, height), va="center", **right_of_axes)


def share_steps(last: float, *axes: plt.Axes) -> None:
    """One scale of steps up to ``last``; its name at the lowest."""
    for axis in axes:
        axis.set_xlim(-0.01 * last, 1.01 * last)
    axes[-1].set_xlabel("optimizer step")


def tidy(axis: plt.Axes) -> None:
    """Draw a pale grid, and a frame only along the scales."""
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
