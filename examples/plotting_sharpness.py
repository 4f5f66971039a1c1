"""Table and picture of the edge-of-stochastic-stability example."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from curves import Curve
from matplotlib.ticker import LogLocator, NullFormatter
from plotting import EDGE_SHARE, first_step_at_edge, label_at_right, plt, share_steps, tidy

# Batch sharpness has reached the edge where the median of its share over the next tenth of the run exceeds EDGE_SHARE:
# some five measurements, each with a standard error of a few per cent. A change is judged over as many steps.
PLATEAU_PART = 10

# The colours of the paper's figure 6: the current batch red, the mean over batches green, the whole data blue.
STYLES = {
    "batch_sharpness": {"label": "batch sharpness", "color": "#009e73", "linewidth": 2.0},
    "lambda_max": {"label": r"$\lambda_{\max}$ of all data", "color": "#1b3a6b", "linewidth": 1.8},
    "gni": {"label": "GNI", "color": "#e69f00", "linewidth": 1.2},
    "ias": {"label": "IAS", "color": "#cc79a7", "linewidth": 1.2},
    "modified_batch_sharpness": {"label": "modified batch sharpness", "color": "#7a9a01", "linewidth": 1.2},
    "lambda_max_b": {"label": r"$\lambda_{\max}^b$ of mini-batches", "color": "#4f97cf", "linewidth": 1.2},
    "lambda_gen": {"label": r"$\lambda_{\mathrm{gen}}$", "color": "#8c564b", "linewidth": 1.2},
}
POINTS = {"color": "#d5352b", "linestyle": "none", "marker": ".", "markeredgewidth": 0}
POINT_OPACITY = 0.5
BAND = 0.22  # opacity of ± one standard error

COLUMNS = 5  # of the legend, before it takes two rows

# Height of the panel as a multiple of the highest 2/η: points of single batches and catapults may leave it.
HEADROOM = 1.8
MOST_HEADROOM = 2.5


@dataclass(frozen=True)
class Phase:
    """The steps from ``start`` on, trained with the same hyperparameters."""

    start: int
    learning_rate: float
    batch_size: int

    @property
    def edge(self) -> float:
        """2/η."""
        return 2 / self.learning_rate

    def change_from(self, before: "Phase") -> str:
        """Return the difference from the phase before, as text."""
        changes = []
        if self.learning_rate != before.learning_rate:
            changes.append(f"η {before.learning_rate:g} → {self.learning_rate:g}")
        if self.batch_size != before.batch_size:
            changes.append(f"b {before.batch_size} → {self.batch_size}")
        return ", ".join(changes)


@dataclass(frozen=True)
class Run:
    """A run of SGD, for the picture and the table.

    Attributes:
        steps: number of steps.
        phases: in order; more than one if hyperparameters changed.
        curvature: by its key; the first is batch sharpness, which defines the edge step.
        errors: standard errors of quantities with one.
        loss: training loss, means over whole epochs.
        step_loss: training loss of single batches.
    """

    steps: int
    phases: list[Phase]
    curvature: dict[str, Curve]
    errors: dict[str, Curve]
    loss: Curve
    step_loss: Curve

    @property
    def stretch(self) -> int:
        """Number of steps that define a plateau or a change."""
        return self.steps // PLATEAU_PART

    def end(self, phase: Phase) -> int:
        """First step after a phase."""
        return min((other.start for other in self.phases if other.start > phase.start), default=self.steps)

    def shares(self, key: str, phase: Phase) -> Curve:
        """Return steps of a phase and the values over its 2/η, without NaN; 1 is the edge."""
        steps, values = self.curvature[key]
        inside = (steps >= phase.start) & (steps < self.end(phase)) & np.isfinite(values)
        return steps[inside], values[inside] / phase.edge

    def edge_step(self, phase: Phase) -> int | None:
        """Return the step from which batch sharpness is at the edge; None if it never is in this phase."""
        return first_step_at_edge(*self.shares(next(iter(self.curvature)), phase), self.stretch)

    def plateau(self, key: str, phase: Phase) -> np.ndarray:
        """Shares under ``key`` from the edge step on."""
        start = self.edge_step(phase)
        steps, shares = self.shares(key, phase)
        return shares[steps >= start] if start is not None else np.empty(0)

    def spike(self, number: int) -> tuple[float, float]:
        """Return the training loss of the last epoch before phase ``number``, and of the worst in the stretch after it.

        NaN where there is no epoch.
        """
        start, (steps, loss) = self.phases[number].start, self.loss
        before, after = loss[steps < start][-1:], loss[(steps >= start) & (steps <= start + self.stretch)]
        return tuple(float(epochs.max()) if epochs.size else np.nan for epochs in (before, after))


def table(run: Run) -> str:
    """Each quantity as a share of 2/η on the plateau of each phase; 1 is the edge of stochastic stability."""
    lines = [
        f"quantity·η/2 on the plateau, the steps from the first whose next {run.stretch} have a median of batch "
        f"sharpness above {EDGE_SHARE}; 1 is the edge.",
        f"{'steps':<14}{'η':>7}{'b':>6}{'2/η':>8}  {'quantity':<25}{'mean':>7}{'lowest':>8}{'highest':>9}{'last':>8}"
        "   from step",
    ]
    for phase in run.phases:
        start, span = run.edge_step(phase), f"{phase.start}–{run.end(phase)}"
        for key in run.curvature:
            plateau, (_, shares) = run.plateau(key, phase), run.shares(key, phase)
            mean, low, high = (f"{f(plateau):.3f}" if plateau.size else "–" for f in (np.mean, np.min, np.max))
            last = f"{shares[-1]:.3f}" if shares.size else "–"
            lines.append(
                f"{span:<14}{phase.learning_rate:>7.3g}{phase.batch_size:>6}{phase.edge:>8.4g}  {key:<25}{mean:>7}"
                f"{low:>8}{high:>9}{last:>8}   {'not reached' if start is None else start}"
            )
    for number, phase in enumerate(run.phases[1:], 1):
        before, worst = run.spike(number)
        after = f"up to {worst:.3g} in the {run.stretch} steps after" if np.isfinite(worst) else "not finite any more"
        change = phase.change_from(run.phases[number - 1])
        lines.append(f"{change} at step {phase.start}: training loss {before:.3g} in the epoch before, {after}.")
    return "\n".join(lines)


def draw(run: Run, path: Path, *, subject: str) -> None:
    """Write the picture to ``path``: the sharpnesses with 2/η over the loss.

    Args:
        run: the run.
        path: PNG.
        subject: network and data, for the title.
    """
    figure = plt.figure(figsize=(9.6, 7.0), layout="constrained")
    figure.suptitle(
        f"Mini-batches sharpen up to 2/η: the edge of stochastic stability\n{subject}", fontsize=13, linespacing=1.5
    )
    upper, lower = figure.subplots(2, 1, height_ratios=[2.3, 1])
    _draw_sharpness(run, upper)
    _draw_loss(run, lower)
    for number, (phase, before) in enumerate(zip(run.phases[1:], run.phases, strict=False)):
        for axis in (upper, lower):
            axis.axvline(phase.start, color="dimgray", linestyle=":", linewidth=1.2)
        _label_change(upper, phase.start, phase.change_from(before), row=number % 2, left=phase.start > run.steps / 2)
    share_steps(run.steps, upper, lower)
    for axis in (upper, lower):
        tidy(axis)
    figure.align_ylabels([upper, lower])
    handles, labels = upper.get_legend_handles_labels()
    columns = len(labels) if len(labels) <= COLUMNS else -(-len(labels) // 2)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_sharpness(run: Run, axis: plt.Axes) -> None:
    axis.plot(
        *run.curvature["step_sharpness"],
        markersize=5,
        alpha=POINT_OPACITY,
        label="step sharpness (one batch)",
        **POINTS,
    )
    for key, (steps, values) in run.curvature.items():
        if key not in STYLES:
            continue
        axis.plot(steps, values, zorder=4 if key == "batch_sharpness" else 3, **STYLES[key])
        if key in run.errors:
            _, error = run.errors[key]
            band = {"color": STYLES[key]["color"], "alpha": BAND, "linewidth": 0}
            axis.fill_between(steps, values - error, values + error, **band)
    edges = [phase.edge for phase in run.phases]
    starts = [*(phase.start for phase in run.phases), run.steps]
    axis.stairs(edges, starts, baseline=None, color="black", linestyle="--", linewidth=1.3, label="2/η", zorder=5)
    label_at_right(axis, edges[-1], f"2/η = {edges[-1]:.3g}")
    # Curves are shown whole, up to 4/η where λ_max of mini-batches lies.
    highest = max(
        (values[np.isfinite(values)].max(initial=0.0) for key, (_, values) in run.curvature.items() if key in STYLES),
        default=0.0,
    )
    ceiling = max(HEADROOM * max(edges), min(1.05 * highest, MOST_HEADROOM * max(edges)))
    axis.set(ylim=(0, ceiling), ylabel="sharpness")
    axis.tick_params(labelbottom=False)


def _label_change(axis: plt.Axes, step: int, text: str, *, row: int, left: bool) -> None:
    """Label a vertical line with the change there, on the side that has room."""
    place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "va": "top", "zorder": 6}
    side = {"xytext": (-5 if left else 5, -4 - 17 * row), "ha": "right" if left else "left"}
    white = {"facecolor": "white", "edgecolor": "none", "pad": 1.5, "alpha": 0.85}
    axis.annotate(text, (step, 1.0), color="dimgray", bbox=white, **place, **side)


def _draw_loss(run: Run, axis: plt.Axes) -> None:
    axis.plot(*run.step_loss, markersize=3, alpha=0.3, **POINTS | {"color": "dimgray"})
    axis.plot(*run.loss, color="black", linewidth=1.3)
    axis.set(yscale="log", ylabel="training loss")
    low, high = axis.get_ylim()
    if high < 10 * low:  # less than a decade has no label of its own, and each minor one would be as wide as the axis
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())
    note = {"xycoords": "axes fraction", "color": "dimgray", "fontsize": 9}
    # A falling loss leaves this corner empty.
    axis.annotate("points: one batch; line: mean of an epoch", (0.012, 0.06), **note)
