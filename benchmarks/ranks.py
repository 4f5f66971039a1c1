"""Measures how much faster two processes measure than one: the same work, one thread each, in one run.

Each of the four families measures one module on one set of images inside a fit, alone and on two DDP processes (gloo)
in turns. A learning rate of 0 leaves the parameters as they are. The time is that of the slower process, from a barrier
before the monitor's hook to its return.

    python benchmarks/ranks.py --fast                  # a minute: does it run?
    python benchmarks/ranks.py --npz cifar10.npz       # 1,024 images; random ones without --npz
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from directional import hardware
from lightning.pytorch.strategies import DDPStrategy
from ranks_teams import Stopwatch, Team, Timing
from spectrum import Page
from timing import LastRow
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from workloads import Batch, Classifier, _example, loss_of

from lightning_curvature import (
    BatchSharpnessMonitor,
    HessianSpectrumMonitor,
    NoiseCovarianceMonitor,
    StabilizationMonitor,
)

GOAL = 1.7
# Samples of a micro-batch, and of a mini-batch of batch sharpness.
SIZE = 32
_WIDTH = 32
# Never reached: every mini-batch that is allowed is drawn.
_NEVER = 1e-9
LIMIT = "limit"
# Passes over the images in its time.
_ROUNDS = 2
LEGEND = """\
CNN of {parameters:,} parameters, {images}. Seconds of one measurement, the least of {repeats} in turns; *first* is the
first of a fit, which reads the samples and checks the step, *later* another one of the same fit. *Processor* is the
same ratio in processor time: that of the busier process from one collective to the next, added up. Other programs on
the machine hardly change it; what collectives themselves wait for is not in it. *Apart*: largest relative difference of
a value from that on one process. *Limit*: forward and backward of all images, shared out, without any exchange.
"""


def network() -> nn.Module:
    """Three convolutions and two linear layers, the block of the noise between them."""
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.GELU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.GELU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, _WIDTH, 3, padding=1), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        *(nn.Linear(_WIDTH, _WIDTH), nn.GELU(), nn.Linear(_WIDTH, 10)),
    )


def module() -> Classifier:
    """The module as every run starts from it; it stands still."""
    torch.manual_seed(0)
    return Classifier(network(), lambda parameters: torch.optim.SGD(parameters, lr=0.0))


def families(fast: bool) -> dict[str, Callable[[], pl.Callback]]:
    """One monitor a family, every step measured."""
    common: dict[str, Any] = {"every_n_train_steps": 1, "micro_batch_size": SIZE, "on_error": "raise"}
    count = 16 if fast else 64
    drawn = {"num_batches": count, "min_batches": count, "relative_error": _NEVER, "batch_size": SIZE}
    grown = {"sample_sizes": (4, 8) if fast else (8, 32, 128), "tolerance": 1e-2, "at_end": False}
    block = {"parameter": "network.10.weight", "pictures": False, "at_end": False, "batch_size": SIZE}
    return {
        "spectrum": lambda: HessianSpectrumMonitor(**common, quantities=("lambda_max",)),
        "batch sharpness": lambda: BatchSharpnessMonitor(**common, **drawn, quantities=("batch_sharpness",)),
        "stabilization": lambda: StabilizationMonitor(**common, **grown),
        "noise": lambda: NoiseCovarianceMonitor(**common, **block),
    }


class Opening(pl.Callback):
    """Before the monitor: starts a watch that belongs to no module, and is put back by no measurement."""

    def __init__(self, watch: Stopwatch) -> None:
        self.watch = watch

    def on_train_batch_start(self, *args: Any) -> None:
        """Start."""
        self.watch.start()


class Closing(Opening):
    """After the monitor."""

    def on_train_batch_start(self, *args: Any) -> None:
        """Stop."""
        self.watch.stop()


def work(data: Batch, fast: bool, name: str, rank: int, ranks: int) -> Timing:
    """Do what has that name."""
    samples = TensorDataset(*data)
    return limit(samples, rank, ranks) if name == LIMIT else measured(name, samples, fast, ranks)


def measured(name: str, data: TensorDataset, fast: bool, ranks: int) -> Timing:
    """Fit for two steps, both measured."""
    watch = Stopwatch()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=DDPStrategy(process_group_backend="gloo") if ranks > 1 else "auto",
        max_steps=2,
        logger=LastRow(),
        callbacks=[Opening(watch), families(fast)[name](), Closing(watch)],
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(module(), DataLoader(data, batch_size=SIZE))
    values = {key: float(value) for key, value in trainer.callback_metrics.items() if "train_loss" not in key}
    return Timing(watch.times, values)


def limit(data: TensorDataset, rank: int, ranks: int) -> Timing:
    """Forward and backward of this process's share of the images, again and again."""
    net, watch = module(), Stopwatch()
    x, y = data.tensors
    batches: list[Batch] = list(zip(x.split(SIZE), y.split(SIZE), strict=True))[rank::ranks]
    for _ in range(2):
        watch.start()
        for batch in _ROUNDS * batches:
            loss_of(net, batch).backward()
        watch.stop()
    return Timing(watch.times)


def images(npz: Path | None, count: int) -> Batch:
    """Images of CIFAR-10, or noise of their shape."""
    if npz is None:
        g = torch.Generator().manual_seed(1)
        return torch.randn(count, 3, 32, 32, generator=g), torch.randint(10, (count,), generator=g)
    data = _example("data").FullBatchData(dataset="cifar10", samples=count, npz=npz)
    data.setup()
    return data.batches[0]


def row(name: str, alone: list[Timing], both: list[Timing]) -> tuple[str, float]:
    """Line of the table, and the smaller ratio in processor time."""
    cells = [name]
    ratios = []
    for step in range(2):
        one, two = (min(timing.times[step][0] for timing in of) for of in (alone, both))
        busy = [min(sum(timing.times[step][1]) for timing in of) for of in (alone, both)]
        ratios.append(busy[0] / busy[1])
        cells += [f"{one:.3f}", f"{two:.3f}", f"{one / two:.2f}", f"{busy[0] / busy[1]:.2f}"]
    mine, theirs = alone[0].values, both[0].values
    apart = [abs(theirs[key] / value - 1.0) for key, value in mine.items() if value]
    return f"| {' | '.join(cells)} | {f'{max(apart):.0e}' if apart else '–'} |", min(ratios)


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=list(families(False)), default=list(families(False)))
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--npz", type=Path, help="real images: x_train (N, 32, 32, 3) uint8, y_train (N,)")
    parser.add_argument("--fast", action="store_true", help="a minute's run on few images")
    parser.add_argument("--out", type=Path, help="write the table to this file too")
    arguments = parser.parse_args()
    if arguments.fast:
        parser.set_defaults(samples=128, repeats=2)
        arguments = parser.parse_args()
    return arguments


def main() -> None:
    """Measure in turns, print the table."""
    arguments = parse_arguments()
    torch.set_num_threads(1)
    data, names = images(arguments.npz, arguments.samples), [LIMIT, *arguments.families]
    found: dict[str, tuple[list[Timing], list[Timing]]] = {name: ([], []) for name in names}
    with tempfile.TemporaryDirectory(prefix="ranks") as folder:
        do = functools.partial(work, data, arguments.fast)
        teams = [Team(ranks, Path(folder), do) for ranks in (1, 2)]
        try:
            for name in arguments.repeats * names:
                for team, timings in zip(teams, found[name], strict=True):
                    timings.append(team.measure(name))
        finally:
            for team in teams:
                team.end()
    page = Page(arguments.out)
    shown = f"{len(data[0]):,} {'random' if arguments.npz is None else 'CIFAR-10'} images"
    parameters = sum(p.numel() for p in network().parameters())
    page.add("## Two processes against one", "", hardware(torch.device("cpu")), "")
    page.add(*LEGEND.format(parameters=parameters, images=shown, repeats=arguments.repeats).splitlines(), "")
    page.add(
        "| | first: one, s | two, s | ratio | processor | later: one, s | two, s | ratio | processor | apart |",
        "|---|---|---|---|---|---|---|---|---|---|",
    )
    rows = {name: row(name, *of) for name, of in found.items()}
    page.add(*(line for line, _ in rows.values()), "")
    page.add(*(f"- {name}: {rows[name][1]:.2f} times as fast (goal {GOAL:g})." for name in arguments.families))


if __name__ == "__main__":
    main()
