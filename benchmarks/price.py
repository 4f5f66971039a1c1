"""What monitors say that they cost, and what they do: a small CNN with each of them, beside the run without.

For each monitor every 30 steps: the price told once ten plain steps are known, how much longer the run took, and both
again with ``max_overhead=0.1``. Runs with and without take turns; the run without is timed before and behind each. All
by processor time, which other work on the machine does not touch.

    python benchmarks/price.py            # ten minutes on one core
    python benchmarks/price.py --fast     # few steps: does it run?
"""

import argparse
import logging
import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from directional import hardware
from noisy_digits import bare_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_curvature import BatchSharpnessMonitor, DirectionalCurvatureMonitor, HessianSpectrumMonitor
from lightning_curvature.monitors import price
from lightning_curvature.monitors.base import Monitor
from lightning_curvature.monitors.price import short

SAMPLES, BATCH, EVERY, BOUND = 2048, 64, 30, 0.1
MONITORS: dict[str, Callable[..., Monitor]] = {
    "λ_KL, λ_FD": lambda **o: DirectionalCurvatureMonitor(estimators=("kl", "finite_difference"), **o),
    "λ_max": lambda **o: HessianSpectrumMonitor(quantities=("lambda_max",), **o),
    "λ_max, trace": lambda **o: HessianSpectrumMonitor(quantities=("lambda_max", "hessian_trace"), **o),
    "batch sharpness, 16 to 256": lambda **o: BatchSharpnessMonitor(min_batches=16, **o),
    "batch sharpness, 8 to 256": lambda **o: BatchSharpnessMonitor(**o),
    "batch sharpness, mean over 10": lambda **o: BatchSharpnessMonitor(average_over=10, **o),
}


class Convolutional(pl.LightningModule):
    """A small CNN, on images of noise."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.GELU(), nn.AvgPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.GELU(), nn.AvgPool2d(4),
            nn.Flatten(), nn.Linear(512, 10),
        )  # fmt: skip

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Told(pl.Callback):
    """Keeps what the monitor in front of it reckons when it tells its price."""

    def __init__(self, monitor: Monitor) -> None:
        self.monitor, self.share = monitor, math.nan

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Once ten plain steps are known."""
        own = self.monitor._price
        if math.isnan(self.share):
            self.share = own.cost / own.plain(trainer) / EVERY


def seconds(steps: int, *callbacks: pl.Callback) -> float:
    """Return the time of a fit, without its first steps."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(SAMPLES, 3, 32, 32, generator=g), torch.randint(10, (SAMPLES,), generator=g)
    start = time.process_time()
    bare_trainer(steps, *callbacks).fit(Convolutional(), DataLoader(TensorDataset(x, y), batch_size=BATCH))
    return time.process_time() - start


def row(name: str, make: Callable[..., Monitor], steps: int) -> str:
    """Return one row of the table."""
    found: list[float | int] = []
    for bound in (None, BOUND):
        monitor = make(every_n_train_steps=EVERY, max_overhead=bound)
        told = Told(monitor)
        before = seconds(steps)
        watched = seconds(steps, monitor, told)
        plain = 0.5 * (before + seconds(steps))
        found += [told.share, watched / plain - 1.0, monitor._interval]
    said, free, _, _, bounded, interval = found
    return f"| {name} | {short(100 * said)} % | {short(100 * free)} % | {short(100 * bounded)} % | {interval} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="few steps")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    price.clock = time.process_time
    steps = 60 if arguments.fast else 900
    print(f"{hardware(torch.device('cpu'))}\n")
    print(f"| monitor, every {EVERY} steps | told | {steps} steps take longer by | with a bound of 10 % | interval |")
    print("|---|---|---|---|---|")
    seconds(10)
    for name, make in list(MONITORS.items())[: 1 if arguments.fast else None]:
        print(row(name, make, steps), flush=True)


if __name__ == "__main__":
    main()
