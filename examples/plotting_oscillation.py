"""Table and picture of λ_osc: what says that a run stands at the edge of stability, and when."""

from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from curves import Curve
from plotting import Run, share_steps, tidy

# Above this the path does not flip at each step.
COSINE_LIMIT = -0.9
# A share at which an indicator counts as saying that the run is at the edge.
AT_EDGE = 0.9


@dataclass(frozen=True)
class Shares:
    """Indicators of one run, as shares of the edge.

    Attributes:
        run: the run.
        room: threshold over λ_max (of the preconditioned Hessian for AdamW).
        oscillation: λ_osc over the same threshold.
        cosine: between the oscillation of two steps in a row.
        headroom: (2/η)/λ_dir.
    """

    run: Run
    room: Curve
    oscillation: Curve
    cosine: Curve
    headroom: Curve

    def first(self, curve: Curve, inverse: bool = False) -> str:
        """Return the first step at which a share is at the edge."""
        steps, values = curve
        shares = 1.0 / values if inverse else values
        at = steps[np.isfinite(shares) & (shares >= AT_EDGE) & (steps > 0)]
        return f"{int(at[0])}" if at.size else "never"


def shares_table(runs: list[Shares]) -> str:
    """First steps at which each indicator says that the edge is reached, and λ_osc/λ_max."""
    lines = [
        f"First measured step at {AT_EDGE:g} of the edge or beyond, and λ_osc/λ_max where the path flips "
        f"(cosine below {COSINE_LIMIT:g}).",
        f"{'optimizer':<16}{'η':>8}{'λ_max':>8}{'λ_osc':>8}{'λ_dir':>8}{'λ_osc/λ_max: median':>22}{'flips at':>12}",
    ]
    for one in runs:
        steps, ratio = one.oscillation
        largest = 1.0 / np.interp(steps, *one.room)
        quotients = (ratio / largest)[np.isfinite(ratio)]
        middle = f"{np.median(quotients):.2f}" if quotients.size else "–"
        lines.append(
            f"{one.run.title:<16}{one.run.learning_rate:>8.3g}{one.first(one.room, True):>8}"
            f"{one.first(one.oscillation):>8}{one.first(one.headroom, True):>8}{middle:>22}"
            f"{np.isfinite(ratio).mean():>11.0%}"
        )
    return "\n".join(lines)


def draw_shares(runs: list[Shares], path: Path, *, subject: str, log_loss: bool) -> None:
    """Write the picture: one column a run, shares of the edge over the cosine over the loss."""
    figure, rows = plt.subplots(
        3, len(runs), figsize=(5.4 * len(runs), 7.6), height_ratios=[2, 1, 1], squeeze=False, layout="constrained"
    )
    figure.suptitle(f"Shares of the edge of stability, for each optimizer its own\n{subject}", fontsize=13)
    for column, one in enumerate(runs):
        top, middle, bottom = rows[:, column]
        steps, room = one.room
        top.plot(steps, 1.0 / room, color="#8fc7ea", linewidth=4.5, label=r"$\lambda_{\max}$ / threshold")
        steps, headroom = one.headroom
        top.plot(steps, 1.0 / headroom, color="#bbbbbb", linewidth=0.9, label=r"$\lambda_{\mathrm{dir}}\,\eta/2$")
        steps, ratio = one.oscillation
        top.plot(steps, ratio, ".", color="#d55e00", markersize=4, label=r"$\lambda_{\mathrm{osc}}$ / threshold")
        top.axhline(1.0, color="black", linestyle="--", linewidth=1.2, label="edge of stability")
        top.set_ylim(-0.1, 1.8)
        top.set_title(f"{one.run.title},  η = {one.run.learning_rate:.3g}")
        steps, cosine = one.cosine
        middle.plot(steps, cosine, color="#009e73", linewidth=0.9)
        middle.axhline(COSINE_LIMIT, color="black", linestyle=":", linewidth=1.2)
        middle.set_ylim(-1.05, 1.05)
        bottom.plot(*one.run.loss, color="dimgray", linewidth=1)
        bottom.set_yscale("log" if log_loss else "linear")
        share_steps(one.run.loss[0].max(initial=1), top, middle, bottom)
        for axis in (top, middle, bottom):
            tidy(axis)
    for axis, label in zip(rows[:, 0], ("share of the edge", "cosine of s, last s", "training loss"), strict=True):
        axis.set_ylabel(label)
    figure.align_ylabels(rows[:, 0])
    handles, labels = rows[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
