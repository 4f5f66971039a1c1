"""Operators whose micro-batches are shared out over ranks: the sums, and a rank that fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_curvature.operators import (
    GaussNewtonOperator,
    GradientDifferenceOperator,
    HessianOperator,
    MicroBatch,
    PreconditionedOperator,
    SecondMomentOperator,
    micro_batches,
)
from lightning_curvature.operators.micro_batches import Evaluation
from tests.helpers.operators import CASES, on_ranks, trained

CASE = CASES["squared"]
NETWORK = CASE.network()
PARAMETERS = trained(NETWORK)
SIZES = (4, 2, 1, 3)
PARTS = micro_batches(NETWORK, CASE.loss, CASE.data(*SIZES))
VECTOR = torch.linspace(-1.0, 1.0, sum(p.numel() for p in PARAMETERS), dtype=torch.float64)
LR = 0.7

# Sums of vectors in float64 in another order; a few roundings for each product, two after each other at most.
EXACT = {"rtol": 1e-12, "atol": 1e-14}

Make = Callable[..., Any]
MAKERS: dict[str, Make] = {
    "hessian": HessianOperator,
    "gauss_newton": GaussNewtonOperator,
    "preconditioned": lambda *args, **options: PreconditionedOperator(
        HessianOperator(*args, **options), [torch.full_like(p, 2.0) for p in PARAMETERS]
    ),
    "second_moment": lambda *args, **options: SecondMomentOperator(*args, lr=LR, **options),
}


@pytest.mark.parametrize("shares", [[[0, 2], [1, 3]], [[0], [1, 2, 3]], [[3], [0, 1], [2]]])
@pytest.mark.parametrize("kind", MAKERS)
def test_ranks_sum_to_the_product_of_one_process(kind: str, shares: list[list[int]]) -> None:
    alone = MAKERS[kind](PARTS, PARAMETERS)(VECTOR)
    sums = Sums()

    def job(rank: int, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        return MAKERS[kind]([PARTS[i] for i in shares[rank]], PARAMETERS, reduce=sums.counted(rank, reduce))(VECTOR)

    found = on_ranks(len(shares), job)
    for product in found:
        assert torch.equal(product, found[0])
        assert torch.allclose(product, alone, **EXACT)
    assert sums.made == [1] * len(shares)


class Sums:
    """Counts the reductions of the last run of each rank."""

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}

    def counted(self, rank: int, reduce: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        self.counts[rank] = 0

        def counting(part: Tensor) -> Tensor:
            self.counts[rank] += 1
            return reduce(part)

        return counting

    @property
    def made(self) -> list[int]:
        return [self.counts[rank] for rank in sorted(self.counts)]


def test_differences_sum_over_ranks_too() -> None:
    alone = GradientDifferenceOperator(PARTS, PARAMETERS)(VECTOR)

    def job(rank: int, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        return GradientDifferenceOperator(PARTS[rank::2], PARAMETERS, reduce=reduce)(VECTOR)

    for product in on_ranks(2, job):
        # Gradients of size 1, rounded by 1e-16, over a distance of 1e-6 are summed in another order.
        assert torch.allclose(product, alone, rtol=0.0, atol=1e-9)


@pytest.mark.parametrize(
    ("shares", "groups"),
    [
        # Two mini-batches, {0, 1} and {2, 3}, both cut across the ranks.
        ([[0, 2], [1, 3]], [0, 0, 1, 1]),
        # The second one whole on rank 1, which has nothing of the first; rank 2 has parts of it.
        ([[0], [2, 3], [1]], [0, 0, 1, 1]),
        # Unequal ones.
        ([[0, 3], [1, 2]], [0, 1, 1, 1]),
    ],
)
def test_mini_batches_spread_over_ranks(shares: list[list[int]], groups: list[int]) -> None:
    alone = SecondMomentOperator(PARTS, PARAMETERS, lr=LR, groups=groups)(VECTOR)
    sums = Sums()

    def job(rank: int, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        own = shares[rank]
        operator = SecondMomentOperator(
            [PARTS[i] for i in own],
            PARAMETERS,
            lr=LR,
            groups=[groups[i] for i in own],
            spread=2,
            reduce=sums.counted(rank, reduce),
        )
        return operator(VECTOR)

    found = on_ranks(len(shares), job)
    for product in found:
        assert torch.equal(product, found[0])
        assert torch.allclose(product, alone, **EXACT)
    # The weights, then two products with each of two mini-batches.
    assert sums.made == [5] * len(shares)


def test_spread_on_one_process_is_as_without() -> None:
    groups = [0, 0, 1, 1]
    found = SecondMomentOperator(PARTS, PARAMETERS, lr=LR, groups=groups, spread=2)(VECTOR)
    assert torch.equal(found, SecondMomentOperator(PARTS, PARAMETERS, lr=LR, groups=groups)(VECTOR))


class Broken(Exception):
    pass


def broken(parts: Sequence[MicroBatch]) -> list[MicroBatch]:
    """The last part cannot be evaluated."""

    def evaluate() -> Evaluation:
        raise Broken("no product here")

    return [*parts[:-1], MicroBatch(evaluate, parts[-1].weight)]


FAILING: dict[str, Make] = MAKERS | {
    "difference": GradientDifferenceOperator,
    "spread": lambda parts, parameters, **options: SecondMomentOperator(
        parts, parameters, lr=LR, groups=[0, 1], spread=2, **options
    ),
}


@pytest.mark.parametrize("kind", FAILING)
def test_a_rank_that_fails_sends_nan_and_keeps_its_error(kind: str) -> None:
    before = [p.detach().clone() for p in PARAMETERS]

    def job(rank: int, reduce: Callable[[Tensor], Tensor]) -> tuple[Tensor, Exception | None]:
        parts = PARTS[rank::2]
        operator = FAILING[kind](broken(parts) if rank else parts, PARAMETERS, reduce=reduce)
        return operator(VECTOR), operator.error

    (good, no_error), (bad, error) = on_ranks(2, job)
    for product in (good, bad):
        assert product.shape == VECTOR.shape
        assert product.isnan().all()
    assert no_error is None
    assert isinstance(error, Broken)
    assert all(torch.equal(p, kept) for p, kept in zip(PARAMETERS, before, strict=True))


@pytest.mark.parametrize("kind", FAILING)
def test_on_one_process_the_error_passes(kind: str) -> None:
    operator = FAILING[kind](broken(PARTS[:2]), PARAMETERS)
    with pytest.raises(Broken, match="no product here"):
        operator(VECTOR)
    assert operator.error is None


@pytest.mark.parametrize("kind", [*MAKERS, "difference"])
def test_a_rank_without_data_sends_zeros(kind: str) -> None:
    alone = FAILING[kind](PARTS, PARAMETERS)(VECTOR)

    def job(rank: int, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        return FAILING[kind](PARTS if rank else [], PARAMETERS, reduce=reduce)(VECTOR)

    for product in on_ranks(2, job):
        assert torch.equal(product, alone)
