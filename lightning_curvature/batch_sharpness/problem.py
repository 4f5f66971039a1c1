"""Inputs of one measurement of mini-batch sharpness, and the operators made of them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NoReturn, TypeVar

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_curvature.batch_sharpness.options import CROSSED, FULL_GRADIENT, PAIR, BatchSharpnessOptions
from lightning_curvature.data.population import Population
from lightning_curvature.distributed.reduce import sum_over_ranks
from lightning_curvature.distributed.together import together
from lightning_curvature.linalg import VectorSpace
from lightning_curvature.linalg.space import Reduce
from lightning_curvature.losses.fixed import ProbeLoss
from lightning_curvature.monitors.modules import Modules
from lightning_curvature.operators.base import CurvatureOperator
from lightning_curvature.operators.differences import GradientDifferenceOperator
from lightning_curvature.operators.exact import GaussNewtonOperator, HessianOperator
from lightning_curvature.operators.fallback import FallbackOperator
from lightning_curvature.operators.micro_batches import MicroBatch
from lightning_curvature.operators.sharding import Sharding
from lightning_curvature.optimizers.trial_steps import TrialSteps

Value = TypeVar("Value")


def check_sharded(options: BatchSharpnessOptions) -> None:
    """Raise where sharded parameters cannot be measured as the options say."""
    if options.curvature != "hessian":
        raise MisconfigurationException(
            f"curvature must be 'hessian' where parameters are sharded, got {options.curvature!r}: exact products "
            "do not reach through their gathering."
        )
    if options.batches_at_once not in ("auto", 1):
        raise MisconfigurationException(
            "batches_at_once must be 'auto' or 1 where parameters are sharded, got "
            f"{options.batches_at_once}: all ranks gather them for one mini-batch after the other."
        )


def check_population(population: Population, options: BatchSharpnessOptions, ranks: int, sharded: bool) -> None:
    """Raise where mini-batches of the samples cannot give the quantities."""
    if sharded:
        check_shares(population, ranks)
    # A pair has the Hessian of the samples as they are drawn, which is that of the loss that training descends.
    whole = CROSSED if options.exact else FULL_GRADIENT
    unequal = [quantity for quantity in options.quantities if quantity in whole and population.weighted]
    if unequal:
        raise MisconfigurationException(
            f"quantities must not hold {unequal[0]!r} where samples are drawn by unequal weights, got a "
            "WeightedRandomSampler, whose mean loss is not that of the probe set: leave it out, or give "
            "probe_dataloader= one that draws all equally often."
        )


@dataclass(frozen=True)
class SharpnessProblem:
    """Inputs of one measurement.

    Each rank measures pairs of mini-batches by itself. Sharded parameters, whose backward gathers them and averages
    over the ranks, are measured by all ranks together: they share out the micro-batches of a mini-batch, as many to
    each, and products are differences of gradients, so that every rank knows the same of the same pairs. There, where a
    rank fails before the first forward, all ranks raise; later the others would wait for it, as in training.

    Attributes:
        curvature: makes products with the curvature of micro-batches, where parameters are whole.
        loss: makes micro-batches of what was drawn.
        sharded: whether ranks hold parts of them.
        lr: η.
        population: the samples to draw mini-batches from, or None where only the step's own batch counts.
        step: this rank's micro-batches of the coming step, weighted as its gradient weights them.
        trials: makes the updates of the optimizer, for "lambda_gen" and "update_sharpness".
        key: of the draws: other batches at every step, and the same ones in a resumed run.
        on_product: called after every product.
        modules: of the parameters, where values by module are wanted.
    """

    trainer: pl.Trainer
    curvature: type[HessianOperator] | type[GaussNewtonOperator]
    loss: ProbeLoss
    parameters: Sequence[Tensor]
    sharded: bool
    lr: float
    population: Population | None
    step: Sequence[MicroBatch]
    trials: TrialSteps | None
    key: int
    on_product: Callable[[], None]
    modules: Modules | None = None

    @cached_property
    def _sharding(self) -> Sharding | None:
        """How ranks share the parameters; None where each holds all of them. One collective."""
        return Sharding.of(self.trainer, self.parameters, self.loss.gathers) if self.sharded else None

    @cached_property
    def space(self) -> VectorSpace:
        """The space of the parameters."""
        return VectorSpace(self.parameters) if self._sharding is None else self._sharding.space

    @property
    def turns(self) -> tuple[int, int]:
        """Number of ranks that measure different pairs, and this rank's place among them."""
        return (1, 0) if self.sharded else (self.trainer.world_size, self.trainer.global_rank)

    @property
    def reduce(self) -> Reduce | None:
        """Sum over the ranks that measure different pairs; None where there is one."""
        return None if self.sharded else sum_over_ranks(self.trainer)

    def by_module(self, terms: Tensor) -> Tensor:
        """Return the sums over modules, (modules,), of numbers by parameter; their sum, (1,), where none are wanted."""
        return terms.sum(0, keepdim=True) if self.modules is None else self.modules.sums(self.parameters, terms)

    def operator(self, micro_batches: Sequence[MicroBatch], multiplied: bool = True) -> CurvatureOperator:
        """Return the operator of the micro-batches of all ranks, as many on each where parameters are sharded.

        ``micro_batches`` are this rank's. Unless ``multiplied``, it gives the gradient alone if parameters are whole.
        """
        if self._sharding is not None:
            options: dict[str, Any] = {"history": self.loss.second.history, "processes": self.trainer.num_devices}
            return GradientDifferenceOperator(micro_batches, self.parameters, sharding=self._sharding, **options)
        if not multiplied:
            return CurvatureOperator(micro_batches, self.parameters, reduce=self.reduce)
        return self._of_whole(micro_batches, reduce=self.reduce)

    def _of_whole(self, micro_batches: Sequence[MicroBatch], reduce: Reduce | None = None) -> CurvatureOperator:
        """Return the operator of this rank's micro-batches by the parameters; they are whole."""
        if self.curvature is not HessianOperator:
            return self.exact(micro_batches, self.parameters, reduce=reduce)
        known: dict[str, Any] = {"second": self.loss.second, "processes": self.trainer.num_devices}
        return FallbackOperator(micro_batches, self.parameters, reduce=reduce, **known)

    def exact(self, micro_batches: Sequence[MicroBatch], leaves: Sequence[Tensor], **options: Any) -> CurvatureOperator:
        """Return the operator of this rank's micro-batches by the parameters, or by copies of them."""
        return self.curvature(micro_batches, leaves, processes=self.trainer.num_devices, **options)

    def pair(self, number: int) -> Iterator[CurvatureOperator]:
        """Draw the mini-batches of a pair and yield their operators. One collective where parameters are sharded."""
        numbers = range(PAIR * number, PAIR * (number + 1))
        if self.sharded:
            yield from map(self.operator, self._on_all(lambda: list(map(self.draw, numbers)), "drawing a mini-batch"))
        else:
            yield from (self._of_whole(self.draw(one)) for one in numbers)

    def draw(self, number: int) -> list[MicroBatch]:
        """Return this rank's micro-batches of the mini-batch of this number."""
        assert self.population is not None
        batches = self.population.draw(self.key, number)
        every = self.loss.parts_of(batches, sum(batch.size for batch in batches))
        if not self.sharded:
            return every
        ranks, rank = self.trainer.world_size, self.trainer.global_rank
        if self.population.own_batches is not None:
            # Each rank has drawn all of them from its own batches. Seeds of masks go by the places in a mini-batch.
            count = len(every) // ranks
            return every[rank * count : (rank + 1) * count]
        share = every[rank::ranks]
        # As many forwards on each rank.
        return share + [replace(every[-1], weight=0.0)] * (-(-len(every) // ranks) - len(share))

    def whole(self) -> list[MicroBatch]:
        """Return this rank's micro-batches of all samples. One collective where parameters are sharded."""
        assert self.population is not None
        whole = self.population.whole
        try:
            if self.sharded:
                return self._on_all(lambda: self.loss.parts(whole()), "collating the probe set")
            return self.loss.parts(whole())
        except Exception as error:
            if self.reduce is None:
                raise
            failure = error.with_traceback(None)

        def fail() -> NoReturn:
            raise failure

        # The other ranks are on their way to the first product: it fails there, and they learn of it.
        return [MicroBatch(fail, 0.0)]

    def _on_all(self, make: Callable[[], Value], what: str) -> Value:
        """Return what ``make`` returns on this rank; where it raises on one rank, all of them raise."""
        made: list[Value] = []

        def on_this_rank() -> Mapping[str, Tensor]:
            made.append(make())
            return {}

        together(self.trainer, on_this_rank, {}, what)
        return made[0]


def check_shares(population: Population, ranks: int) -> None:
    """Raise where ranks draw from batches of their own, and a mini-batch takes more from one rank than from another."""
    count = population.own_batches
    if count is not None and count % ranks:
        raise MisconfigurationException(
            "a mini-batch must take as many batches of each rank where parameters are sharded and the dataset has "
            f"no indices, got {count} for {ranks} ranks: choose another batch_size or micro_batch_size, or give "
            "probe_dataloader= over a dataset with indices."
        )
