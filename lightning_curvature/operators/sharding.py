"""Gradients by parameters that ranks hold parts of (FSDP2), which all of them make together."""

import contextlib
import functools
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor

from lightning_curvature.distributed.gathers import Gathers
from lightning_curvature.distributed.reduce import sum_over_ranks
from lightning_curvature.distributed.shards import fresh_shards, local, own_part, shard_count
from lightning_curvature.linalg import VectorSpace
from lightning_curvature.linalg.space import Reduce
from lightning_curvature.operators.base import CurvatureOperator

if TYPE_CHECKING:
    import lightning.pytorch as pl

Value = TypeVar("Value")

WHERE_SHARDED = (
    "products with the Hessian are made by a difference of gradients, since parameters are sharded and second "
    "derivatives do not reach through their gathering."
)


@dataclass(frozen=True)
class Sharding:
    """Sharding of parameters whose backward gathers and averages over the ranks; all need as many micro-batches.

    Attributes:
        space: the space of the parameters, with this rank's shards.
        around: context for passes with perturbed shards, which may fail.
        gathers: what is known of the gatherings of a forward and of a backward.
        reduce: sum over the ranks; None on one process.
    """

    space: VectorSpace
    ranks: int
    around: Callable[[], contextlib.AbstractContextManager[object]]
    gathers: Gathers
    reduce: Reduce | None = None

    @classmethod
    def of(cls, trainer: "pl.Trainer", parameters: Sequence[Tensor], gathers: Gathers | None = None) -> "Sharding":
        """Return the sharding of the module of a Trainer, one collective; ``gathers``: what is known already."""
        reduce, module = sum_over_ranks(trainer), trainer.lightning_module
        space = VectorSpace(
            [local(p) for p in parameters],
            reduce=reduce,
            shares=[shard_count(p) / trainer.world_size for p in parameters],
            shapes=[p.shape for p in parameters],
            cut=[functools.partial(own_part, like=p) for p in parameters],
        )
        return cls(space, trainer.world_size, lambda: fresh_shards(module), gathers or Gathers(module), reduce)

    def forward(self, operator: CurvatureOperator, evaluate: Callable[[], Value]) -> Value | None:
        """Return what a forward gives; None where it fails, or one has failed before, with the error in ``operator``.

        This rank then only gathers with the others.
        """
        with _noting(operator), self.gathers.forwards(1):
            if operator.error is not None:
                raise operator.error
            return evaluate()
        return None

    def gradients(
        self, operator: CurvatureOperator, loss_of: Callable[[], Tensor], weight: float, parameters: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """Return gradients by ``backward``, averaged over the ranks: ``grad`` does not reach the shards.

        NaN on all ranks where one of them fails.
        """
        loss = self.forward(operator, loss_of)

        def backward() -> None:
            if loss is None:
                raise operator.error or RuntimeError
            (loss * (weight * self.ranks)).backward()

        # ``p.grad`` must be None before: see :func:`~lightning_curvature.replay.isolation.untouched`.
        with _noting(operator):
            self.gathers.whole("backward", backward)
        gradients = [None if p.grad is None else local(p.grad) for p in parameters]
        for p in parameters:
            p.grad = None
        return gradients


@contextlib.contextmanager
def _noting(operator: CurvatureOperator) -> Generator[None, None, None]:
    """Keep the first error of an operator, without its frames, and go on."""
    try:
        yield
    except Exception as error:
        operator.error = operator.error or error.with_traceback(None)
