"""What running means spare: mini-batches drawn along a run, at equal standard errors of the value that is read off.

An MLP learns digits, half of them with a random label, until batch sharpness stands at 2/η. Monitors measure it at the
same steps: each measurement for itself, with at least 16 draws or at least 8, and by means over ten measurements. What
is read off is compared with many draws at the same steps, or with the mean of those over the same ten.

    python benchmarks/sharpness_average.py            # four minutes on one core
    python benchmarks/sharpness_average.py --fast     # few steps: does it run?
"""

import argparse
import logging
from statistics import fmean, median
from typing import Any

import lightning.pytorch as pl
import torch
from directional import hardware
from noisy_digits import bare_trainer
from plateaus import SETTINGS, Learner, digits
from torch.utils.data import DataLoader

from lightning_curvature import BatchSharpnessMonitor

KEY, OVER, REFERENCE = "batch_sharpness", 10, 1024
WAYS: dict[str, dict[str, Any]] = {
    "each by itself, at least 16": {"min_batches": 16},
    "each by itself, at least 8": {"min_batches": 8},
    f"mean over {OVER}, at least 8": {"min_batches": 8, "average_over": OVER},
}


class Values(pl.Callback):
    """What monitors measured, step by step."""

    def __init__(self, monitors: list[BatchSharpnessMonitor]) -> None:
        self.monitors = monitors
        self.rows: list[list[dict[str, float]]] = [[] for _ in monitors]

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Stands behind the monitors: note what they have measured before this step."""
        for rows, monitor in zip(self.rows, self.monitors, strict=True):
            if trainer.global_step % monitor.options.every_n_train_steps == 0:
                rows.append(monitor.result.values())


def table(steps: int, every: int, seeds: int) -> list[str]:
    """Return the rows of the table."""
    exactly = {"min_batches": REFERENCE, "num_batches": REFERENCE, "relative_error": 1e-9}
    rows: list[list[dict[str, float]]] = [[] for _ in range(1 + len(WAYS))]
    means: list[float] = []
    for seed in range(seeds):
        options: dict[str, Any] = {"quantities": (KEY,), "every_n_train_steps": every, "seed": seed}
        monitors = [BatchSharpnessMonitor(**options, **exactly, prefix="reference")]
        monitors += [BatchSharpnessMonitor(**options, **way, prefix=f"way{i}") for i, way in enumerate(WAYS.values())]
        values = Values(monitors)
        setting = SETTINGS[0]
        loader = DataLoader(digits(), batch_size=setting.batch_size, shuffle=True, drop_last=True)
        bare_trainer(steps, *monitors, values).fit(Learner(setting.make), loader)
        # From where all means are over as many measurements as they shall be.
        for all_rows, found in zip(rows, values.rows, strict=True):
            all_rows += found[OVER:]
        truths = [row[KEY] for row in values.rows[0]]
        means += [fmean(truths[i + 1 - OVER : i + 1]) for i in range(OVER, len(truths))]
    lines = []
    for name, found in zip(WAYS, rows[1:], strict=True):
        end = "_average" if "mean" in name else ""
        truths = means if end else [row[KEY] for row in rows[0]]
        errors = [row[f"{KEY}{end}_stderr"] / truth for row, truth in zip(found, truths, strict=True)]
        off = [row[f"{KEY}{end}"] / truth - 1.0 for row, truth in zip(found, truths, strict=True)]
        covered = fmean(abs(a) <= 2.0 * b for a, b in zip(off, errors, strict=True))
        drawn, distance = fmean(row[f"{KEY}_batches"] for row in found), fmean(o * o for o in off) ** 0.5
        lines.append(
            f"| {name} | {drawn:.1f} | {100.0 * median(errors):.1f} % | {100.0 * distance:.1f} % "
            f"| {100.0 * fmean(off):+.1f} % | {100.0 * covered:.0f} % of {len(found)} |"
        )
    return lines


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="few steps")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    steps, every, seeds = (240, 20, 1) if arguments.fast else (1000, 20, 2)
    print(f"{hardware(torch.device('cpu'))}\n")
    print("| measurement | mini-batches drawn | standard error, median | distance, rms | mean | within two errors |")
    print("|---|---|---|---|---|---|")
    print("\n".join(table(steps, every, seeds)))


if __name__ == "__main__":
    main()
