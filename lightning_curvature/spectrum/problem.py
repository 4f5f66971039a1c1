"""Inputs of one spectrum measurement, and the operators made of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

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
from lightning_curvature.operators.graphs import KeepGraph
from lightning_curvature.operators.memory import vectors_that_fit
from lightning_curvature.optimizers.stability import StabilityRule, preconditioner

# Share of the free memory that the basis of an eigensolver may take, and the most vectors that are of use: a restart
# after so many costs little.
_BASIS_SHARE, _LONGEST_BASIS = 0.25, 64


class Operator(Protocol):
    """A symmetric operator on a vector space."""

    space: VectorSpace

    def __call__(self, vector: Tensor) -> Tensor:
        """Return the product with a vector."""


@dataclass(frozen=True)
class SpectrumProblem:
    """Inputs of one spectrum measurement.

    Attributes:
        trainer: the Trainer.
        micro_batches: this rank's micro-batches.
        parameters: the parameters to differentiate by.
        sharded: whether ranks hold parts of them.
        optimizer: the optimizer that moves them.
        rule: its thresholds.
        groups: for each micro-batch the number of its mini-batch.
        spread: number of mini-batches that ranks share, or None.
        seed: of random vectors.
        on_product: called after every product.
    """

    trainer: pl.Trainer
    micro_batches: Sequence[MicroBatch]
    parameters: Sequence[Tensor]
    sharded: bool
    optimizer: Any
    rule: StabilityRule
    groups: Sequence[int]
    spread: int | None
    seed: int
    on_product: Callable[[], None]

    @cached_property
    def _sharding(self) -> Sharding | None:
        """How ranks share the parameters; None where each holds all of them. One collective."""
        return Sharding.of(self.trainer, self.parameters) if self.sharded else None

    def operator(self, kind: str, difference: bool, keep_graph: KeepGraph) -> CurvatureOperator:
        """Return an operator on the probe set.

        Args:
            kind: "hessian", "gauss_newton" or "second_moment"; for "preconditioned" the Hessian.
            difference: whether products with the Hessian are differences of gradients.
            keep_graph: whether graphs are kept from product to product.
        """
        data, reduce = (self.micro_batches, self.parameters), sum_over_ranks(self.trainer)
        exact: dict[str, Any] = {"reduce": reduce, "keep_graph": keep_graph, "processes": self.trainer.num_devices}
        if kind == "gauss_newton":
            return GaussNewtonOperator(*data, **exact)
        if kind == "second_moment":
            return SecondMomentOperator(*data, lr=self.rule.lr, groups=self.groups, spread=self.spread, **exact)
        if difference:
            return GradientDifferenceOperator(*data, sharding=self._sharding, reduce=reduce)
        return HessianOperator(*data, **exact)

    def preconditioned(self, hessian: CurvatureOperator) -> PreconditionedOperator:
        """Return the Hessian, preconditioned as the optimizer does at this step."""
        return PreconditionedOperator(hessian, preconditioner(self.optimizer, self.parameters))


def basis_length(parameters: Sequence[Tensor], trainer: pl.Trainer) -> float:
    """Return how many vectors of an eigensolver's basis fit into the memory of this rank."""
    space = VectorSpace([local(p) for p in parameters])
    return min(_LONGEST_BASIS, vectors_that_fit(space, _BASIS_SHARE, trainer.num_devices))
