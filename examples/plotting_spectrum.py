"""Table and picture of the progressive-sharpening example."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from curves import Curve
from plotting import EDGE_SHARE, PLATEAU_STEPS, first_step_at_edge, label_at_right, plt, share_steps, tidy

from lightning_curvature.linalg import Eigenpairs, SpectralDensity, TraceEstimate

COLUMNS = 2  # runs side by side before the picture goes on below

# The followed eigenvalue is dark, what is shown beside it pale.
STYLES = {
    "lambda_max": {"color": "#1b3a6b", "linewidth": 1.8},
    "preconditioned_lambda_max": {"color": "#1b3a6b", "linewidth": 1.8},
    "lambda_2": {"color": "#4f97cf", "linewidth": 1.1},
    "lambda_3": {"color": "#a9d3f0", "linewidth": 1.1},
}
LABELS = {
    "lambda_max": r"$\lambda_{\max}(H)$",
    "preconditioned_lambda_max": r"$\lambda_{\max}(P^{-1/2} H P^{-1/2})$",
    "lambda_2": r"$\lambda_2$",
    "lambda_3": r"$\lambda_3$",
}
BESIDE = {"color": "#e69f00", "linewidth": 1.8}  # λ_max(H) of a run that follows the preconditioned one
ACCENT = "#009e73"  # trace and density

# Height of a panel as a share of the threshold: at least, and at most where a peak leaves the frame.
HEADROOM = (1.2, 2.0)
DENSITY_WIDTH = 4e-3  # of the smoothing, as a share of the range: a single eigenvalue is a peak that one can see
DENSITY_FLOOR = 0.1  # of the height of a single eigenvalue: below there is nothing but its tails


@dataclass(frozen=True)
class Track:
    """One eigenvalue along a run.

    Attributes:
        key: the monitor's key, e.g. "lambda_max".
        steps: measured steps.
        values: the eigenvalue.
        thresholds: of the optimizer, at the same steps.
    """

    key: str
    steps: np.ndarray
    values: np.ndarray
    thresholds: np.ndarray

    @property
    def shares(self) -> np.ndarray:
        """λ/threshold: 1 is the edge. NaN where λ is not defined."""
        return self.values / self.thresholds

    def edge_step(self) -> int | None:
        """Measured step from which λ is at the edge; None if it never is."""
        return first_step_at_edge(self.steps, self.shares)

    def plateau(self) -> np.ndarray:
        """λ/threshold from the edge step on."""
        start = self.edge_step()
        return self.shares[self.steps >= start] if start is not None else np.empty(0)


@dataclass(frozen=True)
class Run:
    """One optimizer's run.

    Attributes:
        title: the optimizer's name.
        learning_rate: η.
        formula: the threshold of the first track, e.g. "2/η".
        loss: training loss.
        tracks: eigenvalues; the threshold belongs to the first.
        trace: trace of H and its standard error.
    """

    title: str
    learning_rate: float
    formula: str
    loss: Curve
    tracks: list[Track]
    trace: tuple[Curve, Curve]

    @property
    def threshold(self) -> float:
        """Threshold of the first track at the end; that of Adam changes in the first steps."""
        return float(self.tracks[0].thresholds[-1])

    @property
    def preconditioned(self) -> bool:
        """Whether the threshold is one of the preconditioned Hessian."""
        return self.tracks[0].key.startswith("preconditioned")


@dataclass(frozen=True)
class Spectrum:
    """The spectrum of H after the last step of a run.

    Attributes:
        run: the run.
        top: the largest eigenvalues.
        trace: sum of all eigenvalues.
        density: of all eigenvalues.
    """

    run: Run
    top: Eigenpairs
    trace: TraceEstimate
    density: SpectralDensity

    def __str__(self) -> str:
        """In one line."""
        share = float(self.top.values.sum()) / self.trace.value
        return (
            f"{self.run.title} after {self.run.loss[0].size} steps: the trace of H is {self.trace.value:.3g} ± "
            f"{self.trace.standard_error:.1g}; {len(self.top.values)} of {self.density.dimension:,} eigenvalues make "
            f"{share:.0%} of it."
        )


def table(runs: list[Run]) -> str:
    """Each eigenvalue as a share of its threshold on the plateau; 1 is the edge of stability."""
    lines = [
        f"λ/threshold on the plateau, the steps from the first whose next {PLATEAU_STEPS} have a median above "
        f"{EDGE_SHARE}; 1 is where the optimizer turns unstable.",
        f"{'optimizer':<12}{'η':>6}{'threshold':>11}  {'eigenvalue':<27}{'mean':>7}{'lowest':>8}{'highest':>9}"
        f"{'last':>8}   {'from step':<13}{'final loss':>10}",
    ]
    for run in runs:
        for track in run.tracks:
            plateau, start = track.plateau(), track.edge_step()
            mean, low, high = (f"{f(plateau):.3f}" if plateau.size else "–" for f in (np.mean, np.min, np.max))
            reached = "not reached" if start is None else str(start)
            lines.append(
                f"{run.title:<12}{run.learning_rate:>6.3g}{track.thresholds[-1]:>11.4g}  {track.key:<27}{mean:>7}"
                f"{low:>8}{high:>9}{track.shares[-1]:>8.3f}   {reached:<13}{run.loss[1][-1]:>10.3g}"
            )
    if any(run.preconditioned for run in runs):
        lines.append("AdamW has no threshold on λ_max of H itself: 2/η of gradient descent stands there.")
    return "\n".join(lines)


def draw(runs: list[Run], spectrum: Spectrum, path: Path, *, subject: str) -> None:
    """Write the picture to ``path``: a panel for each run over its loss, and the spectrum over the trace.

    Args:
        runs: the runs.
        spectrum: of one of them.
        path: PNG.
        subject: network and data, for the title.
    """
    blocks = -(-(len(runs) + 1) // COLUMNS)
    figure = plt.figure(figsize=(5.8 * COLUMNS, 4.5 * blocks + 0.8), layout="constrained")
    figure.get_layout_engine().set(hspace=0.03, wspace=0.04)
    figure.suptitle(f"Sharpness rises to where each optimizer turns unstable\n{subject}", fontsize=13, linespacing=1.5)
    rows = figure.subplots(2 * blocks, COLUMNS, squeeze=False, height_ratios=[2.3, 1] * blocks)
    for axis in rows.flat:
        axis.set_visible(False)
    for number in range(len(runs) + 1):
        top, column = 2 * (number // COLUMNS), number % COLUMNS
        upper, lower = rows[top, column], rows[top + 1, column]
        for axis in (upper, lower):
            axis.set_visible(True)
            tidy(axis)
        if number < len(runs):
            _draw_run(runs[number], upper, lower)
        else:
            _draw_spectrum(spectrum, upper, lower)
        upper.legend(loc="lower right" if number < len(runs) else "upper center", frameon=False, fontsize=9.5)
    for column in range(COLUMNS):
        figure.align_ylabels(rows[:, column])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_run(run: Run, upper: plt.Axes, lower: plt.Axes) -> None:
    edge = 1.0 if run.preconditioned else run.threshold
    for place, track in enumerate(run.tracks):
        label, style = LABELS[track.key], STYLES[track.key]
        if run.preconditioned and place:
            label, style = f"{label}, as a share of 2/η", BESIDE
        values = track.shares if run.preconditioned else track.values
        upper.plot(track.steps, values, label=label, zorder=3 - 0.1 * place, **style)
    upper.axhline(edge, color="black", linestyle="--", linewidth=1.2)
    label_at_right(upper, edge, f"{run.formula}\n= {run.threshold:.4g}")
    upper.set_ylim(0, edge * np.clip(1.05 * np.nanmax(run.tracks[0].shares), *HEADROOM))
    upper.set_ylabel("share of the threshold" if run.preconditioned else "eigenvalues of H")
    upper.set_title(f"{run.title},  η = {run.learning_rate:.3g}")
    upper.tick_params(labelbottom=False)
    lower.plot(*run.loss, color="dimgray", linewidth=1)
    lower.set(yscale="log", ylabel="training loss")
    share_steps(run.loss[0].max(initial=1), upper, lower)


def _draw_spectrum(spectrum: Spectrum, upper: plt.Axes, lower: plt.Axes) -> None:
    run, density, top = spectrum.run, spectrum.density, spectrum.top.values
    width = DENSITY_WIDTH * float(density.nodes.max() - density.nodes.min())
    grid = density.grid(width)
    single = 1 / (width * np.sqrt(2 * np.pi))
    count = np.maximum(density.dimension * density.evaluate(grid, width).numpy(), DENSITY_FLOOR * single)
    upper.fill_between(grid, count, count.min(), color=ACCENT, alpha=0.3, linewidth=0)
    upper.plot(grid, count, color=ACCENT, linewidth=1.1, label="density")
    upper.plot(top, np.full(len(top), 2 * single), "v", color="#1b3a6b", markersize=4, label=f"{len(top)} largest")
    if not run.preconditioned:
        upper.axvline(run.threshold, color="black", linestyle="--", linewidth=1.2, label=run.formula)
    upper.set(yscale="log", ylabel="eigenvalues per unit length", ylim=(count.min(), None))
    upper.set_title(f"All {density.dimension:,} eigenvalues of H after {run.title}")
    (steps, trace), (_, error) = run.trace
    lower.fill_between(steps, trace - error, trace + error, color=ACCENT, alpha=0.3, linewidth=0)
    lower.plot(steps, trace, color=ACCENT, linewidth=1.1)
    lower.set(ylabel=f"trace of H ({run.title})", ylim=(0, None))
    share_steps(run.loss[0].max(initial=1), lower)
