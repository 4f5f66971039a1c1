"""What is measured of mini-batch sharpness at one step, and how well."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NoReturn

import lightning.pytorch as pl
from torch import Tensor

from lightning_curvature.data.population import Population
from lightning_curvature.distributed.reduce import sum_over_ranks
from lightning_curvature.linalg import VectorSpace
from lightning_curvature.losses.fixed import ProbeLoss
from lightning_curvature.operators import CurvatureOperator, GaussNewtonOperator, HessianOperator, MicroBatch
from lightning_curvature.operators.exact import Reduce
from lightning_curvature.optimizers.trial_steps import TrialSteps

Quantity = Literal[
    "batch_sharpness", "step_sharpness", "modified_batch_sharpness", "ias", "gni", "lambda_gen", "lambda_max_b"
]
QUANTITIES: tuple[Quantity, ...] = (
    "batch_sharpness",
    "step_sharpness",
    "modified_batch_sharpness",
    "ias",
    "gni",
    "lambda_gen",
    "lambda_max_b",
)

# What each needs beside the gradient of a batch, with its graph.
OWN_PRODUCT = ("batch_sharpness", "modified_batch_sharpness")
CROSS_PRODUCT = ("ias", "gni")
CROSSED = (*CROSS_PRODUCT, "lambda_gen")
# They hold ∇L of the whole probe set.
FULL_GRADIENT = ("gni", "lambda_gen")
# Of the pairs of batches that a rank draws at a time, each gives the curvature for the other's gradient.
PAIR = 2


@dataclass(frozen=True)
class SharpnessProblem:
    """What is measured at one step, and how ranks share it: each measures pairs of mini-batches of its own.

    Attributes:
        trainer: the Trainer.
        curvature: makes products with the curvature of micro-batches.
        loss: makes micro-batches of what was drawn.
        parameters: the parameters that are differentiated.
        lr: η.
        population: of which mini-batches are drawn, or None where only the step's own batch counts.
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
    can_be_stacked = True

    @cached_property
    def space(self) -> VectorSpace:
        """The space of the parameters."""
        return VectorSpace(self.parameters)

    @property
    def turns(self) -> tuple[int, int]:
        """How many ranks measure pairs of their own, and which of them this one is."""
        return self.trainer.world_size, self.trainer.global_rank

    @property
    def reduce(self) -> Reduce | None:
        """Sum over these ranks; None where there are no others."""
        return sum_over_ranks(self.trainer)

    def together(self, parts: Sequence[MicroBatch], multiplied: bool = True) -> CurvatureOperator:
        """Return the operator of micro-batches of which each rank has some.

        Args:
            parts: those of this rank.
            multiplied: whether products are wanted of it, and not its gradient alone.
        """
        if not multiplied:
            return CurvatureOperator(parts, self.parameters, reduce=self.reduce)
        return self.curvature(parts, self.parameters, reduce=self.reduce, processes=self.trainer.num_devices)

    def pair(self, number: int) -> Iterator[CurvatureOperator]:
        """Draw the mini-batches of a pair, one after the other."""
        assert self.population is not None
        for index in range(PAIR):
            drawn = self.population.draw(self.key, PAIR * number + index)
            parts = self.loss.parts_of(drawn, sum(probe.size for probe in drawn))
            yield self.curvature(parts, self.parameters, processes=self.trainer.num_devices)

    def whole(self) -> list[MicroBatch]:
        """Return this rank's micro-batches of all samples."""
        assert self.population is not None
        try:
            return self.loss.parts(self.population.whole())
        except Exception as error:
            if self.reduce is None:
                raise
            # The others are on their way to the first product: it fails there, and they hear of it.
            return [MicroBatch(functools.partial(_raise, error.with_traceback(None)), 0.0)]


def _raise(error: Exception) -> NoReturn:
    raise error


@dataclass(frozen=True)
class DrawOptions:
    """How many mini-batches are drawn, and what is measured on them.

    Attributes:
        quantities: names, without "step_sharpness".
        num_batches: the most batches, over all ranks.
        min_batches: the fewest that tell something.
        relative_error: relative standard error to reach.
        tolerance: relative residual of "lambda_max_b".
    """

    quantities: tuple[Quantity, ...]
    num_batches: int
    min_batches: int
    relative_error: float
    tolerance: float
