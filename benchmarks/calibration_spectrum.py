"""Compares λ_max, searched for from random vectors and along training, with its true error, over twelve networks.

python benchmarks/calibration_spectrum.py --write docs/calibration_spectrum.md
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import torch
import torch.nn.functional as F
from calibration import BATCH, NETWORKS, STEPS, batches, tabulate
from precision import ninth_decile
from torch import Tensor, nn

from lightning_curvature.linalg import Eigenpairs, EigenTracker, eigenpairs
from lightning_curvature.operators import CurvatureOperator, HessianOperator

Batch = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]
MakeOptimizer = Callable[[Any], torch.optim.Optimizer]

# Searches from random vectors after so many steps, from so many vectors; others go on from each other every EVERY.
POINTS, STARTS, EVERY, SAMPLES = (0, 20, 80, STEPS), 2, 20, 4 * BATCH


@dataclass(frozen=True)
class Found:
    """One search: products, relative error, and the one that is told."""

    products: int
    error: float
    told: float

    @classmethod
    def of(cls, pairs: Eigenpairs, true: float) -> Found:
        """Compare with the true value."""
        return cls(pairs.matvecs, abs(float(pairs.values) / true - 1.0), float(pairs.errors) / abs(true))


def power_iteration(operator: CurvatureOperator, seed: int, true: float) -> Found:
    """PyHessian's search at its defaults: until two values in a row differ by less than 1e-3, 100 products at most."""
    space = operator.space
    vector = space.random(torch.Generator().manual_seed(seed))
    vector, values = vector / space.norm(vector), list[float]()
    while len(values) < 100:
        product = operator(vector)
        values.append(space.dot(vector, product))
        if len(values) > 1 and abs(values[-1] - values[-2]) < 1e-3 * (abs(values[-2]) + 1e-6):
            break
        vector = product / space.norm(product)
    return Found(len(values), abs(values[-1] / true - 1.0), 1e-3)


def true_value(network: nn.Module, loss: Loss, data: Sequence[Batch]) -> float:
    """In float64, from many random vectors, which find clusters, to a small residual."""
    wide = [(x.double(), y.double() if y.is_floating_point() else y) for x, y in data]
    exact = HessianOperator.of(copy.deepcopy(network).double(), loss, wide)
    options = {"block_size": 12, "residual_tolerance": 1e-4, "max_matvecs": 600, "max_basis": 128}
    return float(eigenpairs(exact, exact.space, largest=1, **options).values[0])


Training = Iterator[tuple[int, nn.Module, Sequence[Batch]]]


def training(network: nn.Module, make: MakeOptimizer, loss: Loss, data: Sequence[Batch], steps: int) -> Training:
    """Train a network; yield each step, the network in eval mode, and the data on which curvature is measured."""
    optimizer = make(network.parameters())
    for step in range(steps + 1):
        yield step, network.eval(), data[: SAMPLES // BATCH]
        network.train()
        optimizer.zero_grad()
        x, y = data[step % len(data)]
        loss(network(x), y).backward()
        optimizer.step()


def training_of(title: str) -> Training:
    """Train one of the twelve networks."""
    torch.manual_seed(0)
    make, make_optimizer = NETWORKS[title]
    return training(make(), make_optimizer, F.cross_entropy, batches(), STEPS)


def searches(title: str) -> Iterator[tuple[str, Found]]:
    """Search along the training of one of the twelve networks."""
    return compared(training_of(title), F.cross_entropy, POINTS, range(0, STEPS + 1, EVERY))


def compared(run: Training, loss: Loss, anew: Container[int], followed: Sequence[int]) -> Iterator[tuple[str, Found]]:
    """Search at the steps that are ``followed``, each search going on from the last, and anew at some of them."""
    tracker = EigenTracker()
    for step, network, probe in run:
        if step in followed:
            operator = HessianOperator.of(network, loss, probe)
            true = true_value(network, loss, probe)
            generator = torch.Generator().manual_seed(step)
            pairs = tracker.search(operator, operator.space, largest=1, generator=generator)
            if step > followed[0]:
                yield "along", Found.of(pairs, true)
            for seed in range(STARTS if step in anew else 0):
                generator = torch.Generator().manual_seed(seed)
                yield "anew", Found.of(eigenpairs(operator, operator.space, largest=1, generator=generator), true)
                yield "power", power_iteration(operator, seed, true)
            operator.close()


def header(first: str) -> list[str]:
    """The head of the table."""
    names = ["products", "error", "9th decile", "above 1 %"]
    columns = [first, *names, "within", *names, "within", *names]
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]


def row(title: str, found: Sequence[tuple[str, Found]]) -> str:
    """One line of the table."""
    columns = []
    for kind in ("anew", "along", "power"):
        ours = [search for way, search in found if way == kind]
        errors = [search.error for search in ours]
        columns += [f"{fmean(s.products for s in ours):.1f}", f"{median(errors):.0e}", f"{ninth_decile(errors):.0e}"]
        columns.append(f"{sum(error > 1e-2 for error in errors)} of {len(errors)}")
        if kind != "power":
            # Float32 rounds values by some 1e-6.
            columns.append(f"{sum(s.error <= max(s.told, 2e-6) for s in ours) / len(ours):.0%}")
    return f"| {title} | {' | '.join(columns)} |"


def main() -> None:
    """Print the table; write it where asked."""
    lines = [
        "# λ_max: products, and the error that is told",
        "",
        "Made by `benchmarks/calibration_spectrum.py`: λ_max of twelve networks on scikit-learn's digits",
        f"({SAMPLES} samples, cross-entropy, float32); torch {torch.__version__}, CPU. Three groups of columns:",
        f"searches from random vectors after {', '.join(map(str, POINTS))} steps of training, {STARTS} each; searches",
        f"along training every {EVERY} steps, which go on from each other and begin anew every tenth time, these",
        "included; and the power iteration of PyHessian at its defaults, from the same vectors. Products in the mean;",
        "errors are relative to float64, median and ninth decile. *Within*: share of the values whose error is at most",
        "the one told.",
        "",
        *header("network"),
    ]
    tabulate(__doc__, lines, searches, row)


if __name__ == "__main__":
    main()
