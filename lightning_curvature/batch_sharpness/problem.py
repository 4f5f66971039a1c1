"""Inputs of one measurement of mini-batch sharpness, and the operators made of them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NoReturn

import lightning.pytorch as pl
from torch import Tensor

from lightning_curvature.batch_sharpness.options import PAIR
from lightning_curvature.data.population import Population
from lightning_curvature.distributed.reduce import sum_over_ranks
from lightning_curvature.linalg import VectorSpace
from lightning_curvature.linalg.space import Reduce
from lightning_curvature.losses.fixed import ProbeLoss
from lightning_curvature.operators import CurvatureOperator, GaussNewtonOperator, HessianOperator, MicroBatch
from lightning_curvature.optimizers.trial_steps import TrialSteps


@dataclass(frozen=True)
class SharpnessProblem:
    """Inputs of one measurement; each rank measures pairs of mini-batches by itself.

    Attributes:
        trainer: the Trainer.
        curvature: makes products with the curvature of micro-batches.
        loss: makes micro-batches of what was drawn.
        parameters: the parameters to differentiate by.
        lr: η.
        population: the samples to draw mini-batches from, or None where only the step's own batch counts.
        step: this rank's micro-batches of the coming step, weighted as its gradient weights them.
        trials: makes the updates of the optimizer, for "lambda_gen".
        key: of the draws: other batches at every step, and the same ones in a resumed run.
        on_product: called after every product.
    """

    trainer: pl.Trainer
    curvature: type[HessianOperator] | type[GaussNewtonOperator]
    loss: ProbeLoss
    parameters: Sequence[Tensor]
    lr: float
    population: Population | None
    step: Sequence[MicroBatch]
    trials: TrialSteps | None
    key: int
    on_product: Callable[[], None]

    # Whether mini-batches can be differentiated many at once.
    can_be_stacked: ClassVar[bool] = True

    @cached_property
    def space(self) -> VectorSpace:
        """The space of the parameters."""
        return VectorSpace(self.parameters)

    @property
    def turns(self) -> tuple[int, int]:
        """Number of ranks that measure different pairs, and this rank's place among them."""
        return self.trainer.world_size, self.trainer.global_rank

    @property
    def reduce(self) -> Reduce | None:
        """Sum over the ranks that measure different pairs; None where there is one."""
        return sum_over_ranks(self.trainer)

    def operator(self, micro_batches: Sequence[MicroBatch], multiplied: bool = True) -> CurvatureOperator:
        """Return the operator of the micro-batches of all ranks.

        Args:
            micro_batches: this rank's.
            multiplied: whether products are wanted of it, and not its gradient alone.
        """
        if not multiplied:
            return CurvatureOperator(micro_batches, self.parameters, reduce=self.reduce)
        return self._curvature_of(micro_batches, reduce=self.reduce)

    def _curvature_of(self, micro_batches: Sequence[MicroBatch], **options: Any) -> CurvatureOperator:
        return self.curvature(micro_batches, self.parameters, processes=self.trainer.num_devices, **options)

    def draw(self, number: int) -> list[MicroBatch]:
        """Return this rank's micro-batches of the mini-batch of this number."""
        assert self.population is not None
        batches = self.population.draw(self.key, number)
        return self.loss.parts_of(batches, sum(batch.size for batch in batches))

    def pair(self, number: int) -> Iterator[CurvatureOperator]:
        """Draw the mini-batches of a pair, one after the other, and yield their operators."""
        for index in range(PAIR):
            yield self._curvature_of(self.draw(PAIR * number + index))

    def whole(self) -> list[MicroBatch]:
        """Return this rank's micro-batches of all samples."""
        assert self.population is not None
        try:
            return self.loss.parts(self.population.whole())
        except Exception as error:
            if self.reduce is None:
                raise
            failure = error.with_traceback(None)

        def fail() -> NoReturn:
            raise failure

        # The other ranks are on their way to the first product: it fails there, and they learn of it.
        return [MicroBatch(fail, 0.0)]
