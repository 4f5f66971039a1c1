"""What a spectrum is of at one step, and the operators it is measured on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_curvature.linalg import VectorSpace
from lightning_curvature.operators import (
    GaussNewtonOperator,
    GradientDifferenceOperator,
    HessianOperator,
    MicroBatch,
    PreconditionedOperator,
    SecondMomentOperator,
    Sharding,
)
from lightning_curvature.operators.memory import available_memory
from lightning_curvature.optimizers import StabilityRule, preconditioner
from lightning_curvature.parallel import least_over_ranks, sum_over_ranks

# Share of the free memory that the basis of an eigensolver may take, and the most vectors that are of use: a restart
# after so many costs little.
_BASIS_SHARE, _LONGEST_BASIS = 0.25, 64


class Operator(Protocol):
    """A symmetric operator with what a measurement asks of it."""

    space: VectorSpace

    @property
    def error(self) -> Exception | None:
        """What made a product of this rank fail."""

    def __call__(self, vector: Tensor) -> Tensor:
        """Product with a vector."""

    def close(self) -> None:
        """Let go of memory."""


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
        sharding: how ranks share the parameters, or None.
        seed: of random vectors.
        on_product: called after every product.
    """

    trainer: pl.Trainer
    parts: Sequence[MicroBatch]
    parameters: Sequence[Tensor]
    optimizer: Any
    rule: StabilityRule
    groups: Sequence[int]
    spread: int | None
    sharding: Sharding | None
    seed: int
    on_product: Callable[[], None]


def make_operator(problem: Problem, kind: str, difference: bool, keep_graph: bool | Literal["auto"]) -> Operator:
    """Make the operator called ``kind`` ("hessian", "gauss_newton", "preconditioned", "second_moment").

    Args:
        problem: what it is of.
        kind: which.
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
    hessian: HessianOperator | GradientDifferenceOperator
    if difference:
        options["sharding"] = problem.sharding
        hessian = GradientDifferenceOperator(problem.parts, problem.parameters, **options)
    else:
        hessian = HessianOperator(problem.parts, problem.parameters, **exact)
    if kind == "hessian":
        return hessian
    return PreconditionedOperator(hessian, preconditioner(problem.optimizer, problem.parameters))


def basis_length(space: VectorSpace, trainer: pl.Trainer) -> int:
    """Vectors of the basis that fit into memory, the same number on every rank: they must restart together."""
    row = space.size * torch.finfo(space.dtype).bits // 8
    fits = _BASIS_SHARE * available_memory(space.device, trainer.num_devices) / max(row, 1)
    return int(least_over_ranks(trainer, min(_LONGEST_BASIS, fits)))
