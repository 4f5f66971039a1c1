"""Inputs of one spectrum measurement, and the operators made of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from lightning_curvature import operators
from lightning_curvature.distributed.gathers import Gathers
from lightning_curvature.distributed.reduce import sum_over_ranks
from lightning_curvature.distributed.shards import local
from lightning_curvature.linalg import VectorSpace
from lightning_curvature.monitors.modules import Modules
from lightning_curvature.operators import CurvatureOperator, MicroBatch, SecondMomentOperator, Sharding
from lightning_curvature.operators.differences import DifferenceHistory
from lightning_curvature.operators.graphs import KeepGraph
from lightning_curvature.operators.memory import vectors_that_fit
from lightning_curvature.optimizers.stability import preconditioner, stability_rule

# Share of the free memory for the basis of an eigensolver, and its largest length: a restart after it costs little.
_BASIS_SHARE, _LONGEST_BASIS = 0.25, 64


@dataclass(frozen=True)
class SpectrumProblem:
    """Inputs of one spectrum measurement.

    Attributes:
        parameters: the parameters to differentiate by.
        gathers: where ranks hold parts of them, what is known of how these are gathered; else None.
        groups: for each micro-batch the number of its mini-batch.
        spread: number of mini-batches that ranks share, or None.
        seed: of random vectors.
        modules: of the parameters, where values by module are wanted.
        on_product: called after every product.
    """

    trainer: pl.Trainer
    micro_batches: Sequence[MicroBatch]
    parameters: Sequence[Tensor]
    gathers: Gathers | None
    optimizer: Any
    groups: Sequence[int]
    spread: int | None
    seed: int
    modules: Modules | None
    on_product: Callable[[], None]

    @cached_property
    def _sharding(self) -> Sharding | None:
        """How ranks share the parameters; None where each holds all of them. One collective."""
        return None if self.gathers is None else Sharding.of(self.trainer, self.parameters, self.gathers)

    def operator(self, kind: str, history: DifferenceHistory | None, keep_graph: KeepGraph) -> CurvatureOperator:
        """Return the operator of a kind, for "preconditioned" the Hessian; by differences where a history is given."""
        data, reduce = (self.micro_batches, self.parameters), sum_over_ranks(self.trainer)
        exact: dict[str, Any] = {"reduce": reduce, "keep_graph": keep_graph, "processes": self.trainer.num_devices}
        if kind == "gauss_newton":
            return operators.GaussNewtonOperator(*data, **exact)
        if kind == "second_moment":
            lr = stability_rule(self.optimizer).lr
            return SecondMomentOperator(*data, lr=lr, groups=self.groups, spread=self.spread, **exact)
        if history is not None:
            return operators.GradientDifferenceOperator(*data, sharding=self._sharding, reduce=reduce, history=history)
        return operators.HessianOperator(*data, **exact)

    def preconditioned(self, hessian: CurvatureOperator) -> operators.PreconditionedOperator:
        """Return the Hessian, preconditioned as the optimizer does at this step."""
        return operators.PreconditionedOperator(hessian, preconditioner(self.optimizer, self.parameters))


def basis_length(parameters: Sequence[Tensor], trainer: pl.Trainer) -> float:
    """Return how many vectors of an eigensolver's basis fit into the memory of this rank."""
    space = VectorSpace([local(p) for p in parameters])
    return min(_LONGEST_BASIS, vectors_that_fit(space, _BASIS_SHARE, trainer.num_devices))
