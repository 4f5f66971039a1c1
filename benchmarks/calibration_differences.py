"""Compares eigenvalues by differences of gradients with exact ones, over twelve networks, and the error that is told.

python benchmarks/calibration_differences.py --write docs/calibration_differences.md
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch
import torch.nn.functional as F
from calibration import BATCH, NETWORKS, STEPS, batches, tabulate
from precision import ninth_decile
from torch import Tensor, nn

from lightning_curvature.linalg import eigenpairs
from lightning_curvature.operators import (
    CurvatureOperator,
    DifferenceHistory,
    GradientDifferenceOperator,
    HessianOperator,
    MicroBatch,
    micro_batches,
)

# Steps after which λ_max, λ_2 and λ_min are searched for on so many samples.
POINTS, SAMPLES = (0, 20, 80, STEPS), 4 * BATCH


@dataclass(frozen=True)
class Found:
    """Relative errors of the eigenvalues of one network at one point, and what is told of them."""

    distance: float
    errors: list[float]
    told: list[float]
    single: list[float]
    across: list[float]


def searched(operator: CurvatureOperator) -> tuple[list[Tensor], list[float], list[float]]:
    """Vectors, values, and residuals."""
    generator = torch.Generator().manual_seed(1)
    pairs = eigenpairs(operator, operator.space, largest=2, smallest=1, max_matvecs=60, generator=generator)
    return pairs.vectors, pairs.values.tolist(), pairs.errors.tolist()


def compared(network: nn.Module, data: Sequence[tuple[Tensor, Tensor]]) -> Found:
    """Search by every kind of product; in float64 for the truth."""
    wide = [(x.double(), y) for x, y in data]
    exact = HessianOperator.of(copy.deepcopy(network).double(), F.cross_entropy, wide)
    true = eigenpairs(exact, exact.space, largest=2, smallest=1, tolerance=1e-5, max_matvecs=500).values.tolist()

    def off(values: list[float]) -> list[float]:
        return [abs(value / other - 1.0) for value, other in zip(values, true, strict=True)]

    parts: list[MicroBatch] = micro_batches(network, F.cross_entropy, data)
    parameters, history = list(network.parameters()), DifferenceHistory()
    operator = GradientDifferenceOperator(parts, parameters, history=history)
    vectors, values, residuals = searched(operator)
    distance = history.distance or 0.0
    errors = [operator.uncertainty(*pair) for pair in zip(vectors, values, strict=True)]
    told = [(a + b) / abs(value) for a, b, value in zip(errors, residuals, values, strict=True)]
    # As differences were made before: at one distance for all, from one side of each kink to the other.
    crossed = [replace(part, stepwise=None) for part in parts]
    before = GradientDifferenceOperator(crossed, parameters, history=DifferenceHistory(0.1))
    single = HessianOperator(parts, parameters)
    return Found(distance, off(values), told, off(searched(single)[1]), off(searched(before)[1]))


def points(title: str) -> Iterator[Found]:
    """Train a network; compare at some of its steps, in the modes in which a probe set is measured."""
    torch.manual_seed(0)
    make, make_optimizer = NETWORKS[title]
    network, data = make(), batches()
    optimizer = make_optimizer(network.parameters())
    probe = [(x, y) for x, y in data[: SAMPLES // BATCH]]
    for step in range(STEPS + 1):
        if step in POINTS:
            yield compared(network.eval(), probe)
        if step < STEPS:
            network.train()
            optimizer.zero_grad()
            F.cross_entropy(network(data[step][0]), data[step][1]).backward()
            optimizer.step()


def row(title: str, found: Sequence[Found]) -> str:
    """One line of the table."""
    errors, told, single, across = (
        [one for point in found for one in getattr(point, name)] for name in ("errors", "told", "single", "across")
    )
    within = sum(error <= said for error, said in zip(errors, told, strict=True)) / len(errors)
    columns = [f"{median(values):.1e} | {ninth_decile(values):.1e}" for values in (single, errors, across)]
    distances = sorted({point.distance for point in found})
    shown = f"{distances[0]:g}" if len(distances) == 1 else f"{distances[0]:g} to {distances[-1]:g}"
    return f"| {title} | {shown} | {' | '.join(columns)} | {within:.0%} |"


def main() -> None:
    """Print the table; write it where asked."""
    lines = [
        "# Eigenvalues by differences of gradients",
        "",
        "Made by `benchmarks/calibration_differences.py`: λ_max, λ_2 and λ_min of twelve networks on scikit-learn's",
        f"digits ({SAMPLES} samples, cross-entropy, float32) after {', '.join(map(str, POINTS))} steps of training, 60",
        f"products at most; torch {torch.__version__}, CPU. Errors are relative to exact products in float64, median",
        "and ninth decile. *Exact*: double backward in float32, the limit. *Before*: at one distance for all, across",
        "kinks. *Distance*: in u^{1/3} ‖θ‖, as measured. *Within*: share of the values whose error is at most the one",
        "that is told, residual and distance together. PyHessian and curvlinops have no such products.",
        "",
        "| network | distance | exact | 9th decile | differences | 9th decile | before | 9th decile | within |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    tabulate(__doc__, lines, points, row)


if __name__ == "__main__":
    main()
