"""Mini-batch sharpness of sharded parameters: all ranks measure each mini-batch together."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_curvature.batch_sharpness.at_once import BatchesAtOnce
from lightning_curvature.batch_sharpness.problem import PAIR, SharpnessProblem
from lightning_curvature.data.population import Population
from lightning_curvature.distributed.failures import agree, noted
from lightning_curvature.linalg import VectorSpace
from lightning_curvature.operators import Curvature, CurvatureOperator, GradientDifferenceOperator, MicroBatch, Sharding

Parts = list[MicroBatch]


class ShardedProblem(SharpnessProblem):
    """What is measured where ranks hold parts of the parameters, whose backward gathers and averages over them.

    The micro-batches of a mini-batch are shared out over the ranks, as many to each, and products are differences of
    gradients. So every rank comes to know the same of the same pairs, and nothing is merged.

    What can fail on one rank alone before the first forward is agreed on; after that the others would wait for it, as
    in training.
    """

    can_be_stacked = False

    @staticmethod
    def check(curvature: Curvature, batches_at_once: BatchesAtOnce) -> None:
        """Raise for options that need second derivatives, or parameters in one piece.

        Raises:
            MisconfigurationException: if there are such.
        """
        if curvature != "hessian":
            raise MisconfigurationException(
                f"curvature must be 'hessian' where parameters are sharded, got {curvature!r}: exact products do not "
                "reach through their gathering."
            )
        if batches_at_once not in ("auto", 1):
            raise MisconfigurationException(
                f"batches_at_once must be 'auto' or 1 where parameters are sharded, got {batches_at_once}: all ranks "
                "gather them for one mini-batch after the other."
            )

    @staticmethod
    def check_population(population: Population, ranks: int) -> None:
        """Raise unless mini-batches can be shared out.

        Raises:
            MisconfigurationException: where ranks draw of batches of their own, and a mini-batch would take more of
                some rank's than of another's.
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
        """The space of the parameters, of which ranks hold parts."""
        return self._sharding.space

    @property
    def turns(self) -> tuple[int, int]:
        """All ranks together measure as one."""
        return 1, 0

    @property
    def reduce(self) -> None:
        """They know the same already."""

    def together(self, parts: Sequence[MicroBatch], multiplied: bool = True) -> CurvatureOperator:
        """Return the operator of micro-batches of which each rank has some, and as many as the others."""
        return GradientDifferenceOperator(parts, self.parameters, sharding=self._sharding)

    def pair(self, number: int) -> Iterator[CurvatureOperator]:
        """Draw the mini-batches of a pair. One collective."""
        first = PAIR * number
        shares = self._agreed(lambda: [self._share(first + index) for index in range(PAIR)], "drawing a mini-batch")
        yield from map(self.together, shares)

    def whole(self) -> Parts:
        """Return this rank's micro-batches of all samples. One collective."""
        return self._agreed(lambda: [super(ShardedProblem, self).whole()], "collating the probe set")[0]

    def _agreed(self, make: Callable[[], list[Parts]], what: str) -> list[Parts]:
        made, errors = list[Parts](), list[Exception]()
        with noted(errors):
            made = make()
        agree(self.trainer, errors, what)
        return made

    def _share(self, number: int) -> Parts:
        """This rank's micro-batches of a mini-batch."""
        assert self.population is not None
        ranks, rank = self.trainer.world_size, self.trainer.global_rank
        drawn = self.population.draw(self.key, number)
        parts = self.loss.parts_of(drawn, sum(probe.size for probe in drawn))
        if self.population.own_batches is not None:
            # Each rank has drawn all of them from its own. Seeds of masks go by the places in a mini-batch.
            count = len(parts) // ranks
            return parts[rank * count : (rank + 1) * count]
        own = parts[rank::ranks]
        # As many forwards on each rank.
        return own + [replace(parts[-1], weight=0.0)] * (-(-len(parts) // ranks) - len(own))
