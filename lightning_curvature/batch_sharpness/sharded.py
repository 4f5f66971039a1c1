"""Mini-batch sharpness of sharded parameters: all ranks measure each mini-batch together."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import ClassVar

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_curvature.batch_sharpness.options import PAIR
from lightning_curvature.batch_sharpness.problem import SharpnessProblem
from lightning_curvature.data.population import Population
from lightning_curvature.distributed.together import together
from lightning_curvature.linalg import VectorSpace
from lightning_curvature.operators import CurvatureOperator, GradientDifferenceOperator, MicroBatch, Sharding


class ShardedProblem(SharpnessProblem):
    """Inputs where ranks hold shards of the parameters, whose backward gathers them and averages over the ranks.

    The ranks share out the micro-batches of a mini-batch, as many to each, and products are differences of gradients.
    So every rank knows the same of the same pairs, and nothing is merged.

    Where a rank fails before the first forward, all ranks raise; later the others would wait for it, as in training.
    """

    can_be_stacked: ClassVar[bool] = False

    @staticmethod
    def check_population(population: Population, ranks: int) -> None:
        """Raise unless mini-batches can be shared out.

        Raises:
            MisconfigurationException: where ranks draw from batches of their own, and a mini-batch would take more from
                one rank than from another.
        """
        count = population.own_batches
        if count is not None and count % ranks:
            raise MisconfigurationException(
                "a mini-batch must take as many batches of each rank where parameters are sharded and the dataset has "
                f"no indices, got {count} for {ranks} ranks: choose another batch_size or micro_batch_size, or give "
                "probe_dataloader= over a dataset with indices."
            )

    @cached_property
    def _sharding(self) -> Sharding:
        return Sharding.of(self.trainer, self.parameters)

    @cached_property
    def space(self) -> VectorSpace:
        """The space of the parameters, whose vectors are cut over the ranks."""
        return self._sharding.space

    @property
    def turns(self) -> tuple[int, int]:
        """All ranks measure as one."""
        return 1, 0

    @property
    def reduce(self) -> None:
        """They know the same already."""

    def operator(self, micro_batches: Sequence[MicroBatch], multiplied: bool = True) -> CurvatureOperator:
        """Return the operator of the micro-batches of all ranks, each of which has as many."""
        return GradientDifferenceOperator(micro_batches, self.parameters, sharding=self._sharding)

    def draw(self, number: int) -> list[MicroBatch]:
        """Return this rank's share of the micro-batches of the mini-batch of this number."""
        assert self.population is not None
        (ranks, rank), every = (self.trainer.world_size, self.trainer.global_rank), super().draw(number)
        if self.population.own_batches is not None:
            # Each rank has drawn all of them from its own batches. Seeds of masks go by the places in a mini-batch.
            count = len(every) // ranks
            return every[rank * count : (rank + 1) * count]
        share = every[rank::ranks]
        # As many forwards on each rank.
        return share + [replace(every[-1], weight=0.0)] * (-(-len(every) // ranks) - len(share))

    def pair(self, number: int) -> Iterator[CurvatureOperator]:
        """Draw the mini-batches of a pair and yield their operators. One collective."""
        numbers = range(PAIR * number, PAIR * (number + 1))
        yield from map(self.operator, self._on_all(lambda: list(map(self.draw, numbers)), "drawing a mini-batch"))

    def whole(self) -> list[MicroBatch]:
        """Return this rank's micro-batches of all samples. One collective."""
        return self._on_all(lambda: [super(ShardedProblem, self).whole()], "collating the probe set")[0]

    def _on_all(self, make: Callable[[], list[list[MicroBatch]]], what: str) -> list[list[MicroBatch]]:
        """Return what ``make`` returns on this rank; where it raises on one rank, all of them raise."""
        made: list[list[MicroBatch]] = []

        def on_this_rank() -> Mapping[str, Tensor]:
            made.extend(make())
            return {}

        together(self.trainer, on_this_rank, {}, what)
        return made
