"""Where batch sharpness and update sharpness settle, by optimizer and batch size, as shares of 2/η.

An MLP with ReLU learns digits by heart, half of them with a random label: its sharpness rises until the optimizer ends
the rise. Medians over the second half of each run; the range of update sharpness.

    python benchmarks/plateaus.py             # all runs, six minutes on one core
    python benchmarks/plateaus.py --fast      # two runs, few steps: does it run?
"""

import argparse
import logging
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch
from directional import hardware
from noisy_digits import bare_trainer, noisy_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_curvature import BatchSharpnessMonitor, StabilityMonitor

SAMPLES, WIDTH, WEIGHT_SCALE = 300, 192, 0.3
MEASUREMENTS = 50
KEYS = ("batch_sharpness", "update_sharpness", "stability_index", "plateau_small_batch", "plateau_large_batch")
Make = Callable[[Any], torch.optim.Optimizer]


@dataclass(frozen=True)
class Setting:
    """One run."""

    name: str
    make: Make
    batch_size: int


def sgd(lr: float, momentum: float = 0.0, nesterov: bool = False) -> Make:
    """Return what makes SGD of parameters."""
    return lambda parameters: torch.optim.SGD(parameters, lr=lr, momentum=momentum, nesterov=nesterov)


SETTINGS = [
    Setting("SGD", sgd(0.5), 16),
    Setting("heavy ball 0.5", sgd(0.25, 0.5), 16),
    Setting("heavy ball 0.9", sgd(0.02, 0.9), 4),
    Setting("heavy ball 0.9", sgd(0.05, 0.9), 16),
    Setting("heavy ball 0.9", sgd(0.2, 0.9), 100),
    Setting("heavy ball 0.9", sgd(0.3, 0.9), SAMPLES),
    Setting("Nesterov 0.9", sgd(0.05, 0.9, nesterov=True), 16),
    Setting("Adam", lambda p: torch.optim.Adam(p, lr=0.003), 16),
    Setting("Adam", lambda p: torch.optim.Adam(p, lr=0.003), 100),
]


def digits() -> TensorDataset:
    """Digits and one-hot labels, half of which are random."""
    x, y = noisy_digits(SAMPLES).tensors
    return TensorDataset(x, nn.functional.one_hot(y, 10).float())


class Learner(pl.LightningModule):
    """Half the squared error of an MLP whose weights begin small."""

    def __init__(self, make: Make) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.make = make
        layers = nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10)
        for layer in layers[::2]:
            nn.init.kaiming_normal_(layer.weight)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
            layer.weight.data *= WEIGHT_SCALE  # type: ignore[operator, union-attr]
        self.network = nn.Sequential(*layers)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """½‖z − y‖² in the mean over samples."""
        return 0.5 * (self.network(batch[0]) - batch[1]).square().sum(1).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The setting's."""
        return self.make(self.parameters())


class Rows(pl.Callback):
    """What was measured in the second half of a run; sharpnesses as shares of 2/η."""

    def __init__(self, steps: int, every: int) -> None:
        self.steps, self.every = steps, every
        self.found: dict[str, list[float]] = {key: [] for key in KEYS}

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Note the values of this step."""
        step, metrics = trainer.global_step - 1, trainer.callback_metrics
        if step < self.steps // 2 or step % self.every:
            return
        for key, values in self.found.items():
            value = float(metrics.get(f"curvature/{key}", math.nan))
            edge = 1.0 if key == "stability_index" else float(metrics["curvature/two_over_lr"])
            values += [value / edge] * math.isfinite(value)


def measured(setting: Setting, steps: int) -> str:
    """Return one row of the table."""
    every = max(steps // MEASUREMENTS, 1)
    rows = Rows(steps, every)
    sharpnesses: Any = ("batch_sharpness", "update_sharpness")
    trainer = bare_trainer(
        steps,
        StabilityMonitor(every_n_train_steps=10, window=30),
        BatchSharpnessMonitor(quantities=sharpnesses, every_n_train_steps=every, num_batches=128),
        rows,
    )
    module = Learner(setting.make)
    trainer.fit(module, DataLoader(digits(), batch_size=setting.batch_size, shuffle=True, drop_last=True))
    (sharpness, update, index, *plateaus) = rows.found.values()
    lr = trainer.optimizers[0].param_groups[0]["lr"]
    ends = ", ".join(f"{values[0]:.2g}" for values in plateaus if values)
    return (
        f"| {setting.name} | {lr:g} | {setting.batch_size} | {median(sharpness):.2g} | {ends} | "
        f"{median(update):.2f} ({min(update):.2f} to {max(update):.2f}) | {median(index) if index else math.nan:.2f} |"
    )


def main() -> None:
    """Measure all settings and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="two runs, few steps")
    parser.add_argument("--steps", type=int, default=2500)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    settings, steps = (SETTINGS[1::7], 60) if arguments.fast else (SETTINGS, arguments.steps)
    print(f"Made by `benchmarks/plateaus.py`: {hardware(torch.device('cpu'))}.\n")
    print("| optimizer | η | b | batch sharpness | its plateaus | update sharpness | stability index |")
    print("|---|---|---|---|---|---|---|")
    for setting in settings:
        print(measured(setting, steps), flush=True)


if __name__ == "__main__":
    main()
