"""One measured step: both halves' products with the displacement, and the terms that the index has of them."""

import contextlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_curvature.distributed.together import together
from lightning_curvature.linalg import VectorSpace
from lightning_curvature.operators.base import CurvatureOperator
from lightning_curvature.operators.differences import GradientDifferenceOperator
from lightning_curvature.operators.fallback import FallbackOperator
from lightning_curvature.operators.micro_batches import MicroBatch
from lightning_curvature.operators.sharding import Sharding
from lightning_curvature.stability.problem import StabilityProblem
from lightning_curvature.stability.result import Terms

# The loss of a batch as a multiple of the mean of its halves': 1 where it is a mean, 2 where it is a sum. Dropout,
# whose masks differ, moves it a little.
_KINDS, _LIKENESS = (1.0, 2.0), 0.25


def measured(problem: StabilityProblem, factor: float | None) -> tuple[Terms, float]:
    """Return the terms of one step, the same on every rank, and how its loss scales; all ranks call it.

    Args:
        problem: the inputs.
        factor: the loss of a batch as a multiple of the mean of its halves', where known; three forwards tell.

    Raises:
        Exception: on all ranks, where one of them failed.
    """
    sharding = None
    if problem.sharded:
        sharding = Sharding.of(problem.trainer, problem.parameters, problem.loss.gathers)
    space = VectorSpace(problem.parameters) if sharding is None else sharding.space
    x = space.pack(problem.displacement)
    size = space.norm(x)
    if not size > 0.0:
        raise ValueError("the parameters must have moved away from their average, got no distance: is the lr 0?")
    x /= size  # the index does not depend on it, and squares of a short one leave float32
    if factor is None:
        factor = 1.0 if problem.halves.whole is None else _factor(problem)
    one, two = (factor * product for product in _products(problem, space, sharding, x))
    first, second = problem.halves.shares
    mean, variance = first * one + second * two, problem.kept * first * second * (one - two).square_()
    scale = space.pack(problem.rule.scales)
    square, spreads = space.dot(scale * mean, mean), space.dots_by_tensor(scale, variance).tolist()
    noise = math.fsum(ratio * spread for ratio, spread in zip(problem.rule.ratios, spreads, strict=True))
    numbers = (square - math.fsum(spreads), noise, math.fsum(spreads), space.dot(x, mean))
    if not all(map(math.isfinite, numbers)):
        raise ValueError("the products with the Hessian must be finite, got NaN or infinity: has the loss diverged?")
    return Terms(*(size**2 * number for number in numbers)), factor


def _products(
    problem: StabilityProblem, space: VectorSpace, sharding: Sharding | None, x: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the products of both halves of all ranks with x."""

    def product(parts: Sequence[MicroBatch]) -> Tensor:
        if not parts:
            return space.zeros()
        with contextlib.closing(_operator(problem, parts, sharding)) as operator:
            return operator(x)

    if sharding is not None:  # which makes each of them on all ranks
        return product(problem.halves.parts[0]), product(problem.halves.parts[1])
    products = together(
        problem.trainer,
        lambda: {"products": torch.stack([product(parts) for parts in problem.halves.parts])},
        {"products": torch.stack([space.zeros(), space.zeros()])} if problem.trainer.world_size > 1 else {},
        "a product with a half of the step's data",
    )["products"]
    return products[0], products[1]


def _operator(problem: StabilityProblem, parts: Sequence[MicroBatch], sharding: Sharding | None) -> CurvatureOperator:
    second, processes = problem.loss.second, problem.trainer.num_devices
    if sharding is not None:
        return GradientDifferenceOperator(
            parts, problem.parameters, sharding=sharding, history=second.history, processes=processes
        )
    return FallbackOperator(parts, problem.parameters, second=second, processes=processes)


def _factor(problem: StabilityProblem) -> float:
    """Return the loss of the batch as a multiple of the mean of its halves': 1 or 2."""
    assert problem.halves.whole is not None

    def losses() -> Tensor:
        with torch.no_grad():
            both = [part.evaluate().loss.double() for half in problem.halves.parts for part in half]
            return torch.stack([problem.halves.whole.evaluate().loss.double(), *both])  # type: ignore[union-attr]

    zeros = torch.zeros(3, dtype=torch.float64, device=problem.trainer.strategy.root_device)
    whole, one, two = together(problem.trainer, lambda: {"losses": losses()}, {"losses": zeros}, "a loss")[
        "losses"
    ].tolist()
    mean = problem.halves.shares[0] * one + problem.halves.shares[1] * two
    for kind in _KINDS:
        if abs(whole - kind * mean) <= _LIKENESS * abs(kind * mean):
            return kind
    raise ValueError(
        f"training_step must have a loss that is the mean or the sum over a batch, got {whole:.4g} for one batch, and "
        f"{one:.4g} and {two:.4g} for its halves: accumulate two batches a step, which are not cut."
    )
