"""What monitors say that they cost, and what they do: a small CNN with each of them, beside the run without.

For each monitor every 30 steps: the price told once ten plain steps are known, how much longer the run took, and both
again with ``max_overhead=0.1``; the run without is timed before and behind both. All by processor time, which other
work on the machine does not touch.

    python benchmarks/price.py            # ten minutes on one core
    python benchmarks/price.py --fast     # few steps: does it run?
"""

import argparse
import logging
import math
import re
import time
import warnings
from collections.abc import Callable

import lightning.pytorch as pl
import torch
from directional import hardware
from noisy_digits import bare_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

# Before the package takes its clock from there.
time.perf_counter = time.process_time

from lightning_curvature import BatchSharpnessMonitor, DirectionalCurvatureMonitor, HessianSpectrumMonitor  # noqa: E402

_LOG = logging.getLogger("lightning.pytorch.utilities.rank_zero")
SAMPLES, BATCH, EVERY, BOUND = 2048, 64, 30, 0.1
MONITORS: dict[str, Callable[..., pl.Callback]] = {
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


class Told(logging.Handler):
    """Keeps what a monitor says: the share that it is going to take, in per cent, and the last interval."""

    def __init__(self) -> None:
        super().__init__()
        self.share, self.interval = math.nan, EVERY

    def emit(self, record: logging.LogRecord) -> None:
        """Read a line of Lightning's log."""
        if found := re.search(r"makes the run (\S+) % longer", record.getMessage()):
            self.share = float(found[1].replace(",", ""))
        if found := re.search(r"every_n_train_steps is (\d+) now", record.getMessage()):
            self.interval = int(found[1])


def seconds(steps: int, *callbacks: pl.Callback) -> float:
    """Return the time of a fit, without its first steps."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(SAMPLES, 3, 32, 32, generator=g), torch.randint(10, (SAMPLES,), generator=g)
    start = time.process_time()
    bare_trainer(steps, *callbacks).fit(Convolutional(), DataLoader(TensorDataset(x, y), batch_size=BATCH))
    return time.process_time() - start


def row(name: str, make: Callable[..., pl.Callback], steps: int) -> str:
    """Return one row of the table."""
    said, shares, longer = Told(), list[float](), list[float]()
    _LOG.addHandler(said)
    before = seconds(steps)
    for bound in (None, BOUND):
        longer.append(seconds(steps, make(every_n_train_steps=EVERY, max_overhead=bound)))
        shares.append(said.share)
    plain = 0.5 * (before + seconds(steps))
    free, bounded = (100.0 * watched / plain - 100.0 for watched in longer)
    _LOG.removeHandler(said)
    return f"| {name} | {shares[0]:.0f} % | {free:.0f} % | {bounded:.0f} % | {said.interval} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="few steps")
    arguments = parser.parse_args()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    _LOG.setLevel(logging.INFO)  # to the tables alone
    _LOG.propagate = False
    warnings.filterwarnings("ignore")
    steps = 60 if arguments.fast else 300
    print(f"{hardware(torch.device('cpu'))}\n")
    print(f"| monitor, every {EVERY} steps | told | {steps} steps take longer by | with a bound of 10 % | interval |")
    print("|---|---|---|---|---|")
    seconds(10)
    for name, make in list(MONITORS.items())[: 1 if arguments.fast else None]:
        print(row(name, make, steps), flush=True)


if __name__ == "__main__":
    main()
