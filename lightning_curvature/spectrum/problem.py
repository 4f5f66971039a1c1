"""What a spectrum is of at one step, and the operators it is measured on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import lightning.pytorch as pl
from torch import Tensor

from lightning_curvature.distributed.reduce import sum_over_ranks
from lightning_curvature.distributed.shards import local
from lightning_curvature.linalg import VectorSpace
from lightning_curvature.operators import (
    CurvatureOperator,
    GaussNewtonOperator,
    GradientDifferenceOperator,
    HessianOperator,
    MicroBatch,
    PreconditionedOperator,
    SecondMomentOperator,
    Sharding,
)
from lightning_curvature.operators.memory import vectors_that_fit
from lightning_curvature.optimizers.stability import StabilityRule, preconditioner

# Share of the free memory that the basis of an eigensolver may take, and the most vectors that are of use: a restart
# after so many costs little.
_BASIS_SHARE, _LONGEST_BASIS = 0.25, 64


class Operator(Protocol):
    """A symmetric operator with what a measurement asks of it."""

    space: VectorSpace

    def __call__(self, vector: Tensor) -> Tensor:
        """Product with a vector."""


@dataclass(frozen=True)
class Problem:
    """What the spectrum is of, at one step.

    Attributes:
        trainer: the Trainer.
        parts: this rank's micro-batches.
        parameters: the parameters that are differentiated.
        optimizer: the optimizer that moves them.
        rule: its thresholds.
        groups: for each micro-batch the number of its mini-batch.
        spread: number of mini-batches that ranks share, or None.
        seed: of random vectors.
        on_product: called after every product.
        basis: how many vectors of the eigensolver's basis are kept, the same on every rank: they restart together.
        sharding: how ranks share the parameters, or None.
    """

    trainer: pl.Trainer
    parts: Sequence[MicroBatch]
    parameters: Sequence[Tensor]
    optimizer: Any
    rule: StabilityRule
    groups: Sequence[int]
    spread: int | None
    seed: int
    on_product: Callable[[], None]
    basis: int = 0
    sharding: Sharding | None = None


def make_operator(
    problem: Problem, kind: str, difference: bool, keep_graph: bool | Literal["auto"]
) -> CurvatureOperator:
    """Make the operator called ``kind`` ("hessian", "gauss_newton", "preconditioned", "second_moment").

    Args:
        problem: what it is of.
        kind: which; for "preconditioned" the Hessian.
        difference: whether products with the Hessian are differences of gradients.
        keep_graph: whether graphs are kept from product to product.
    """
    options: dict[str, Any] = {"reduce": sum_over_ranks(problem.trainer)}
    exact = options | {"keep_graph": keep_graph, "processes": problem.trainer.num_devices}
    if kind == "gauss_newton":
        return GaussNewtonOperator(problem.parts, problem.parameters, **exact)
    if kind == "second_moment":
        options = exact | {"groups": problem.groups, "spread": problem.spread}
        return SecondMomentOperator(problem.parts, problem.parameters, lr=problem.rule.lr, **options)
    if difference:
        return GradientDifferenceOperator(problem.parts, problem.parameters, sharding=problem.sharding, **options)
    return HessianOperator(problem.parts, problem.parameters, **exact)


def preconditioned(problem: Problem, hessian: CurvatureOperator) -> PreconditionedOperator:
    """Precondition the Hessian as the optimizer does at this step."""
    return PreconditionedOperator(hessian, preconditioner(problem.optimizer, problem.parameters))


def basis_length(parameters: Sequence[Tensor], trainer: pl.Trainer) -> float:
    """Vectors of a basis that fit into the memory of this rank."""
    space = VectorSpace([local(p) for p in parameters])
    return min(_LONGEST_BASIS, vectors_that_fit(space, _BASIS_SHARE, trainer.num_devices))
