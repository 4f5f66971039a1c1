"""Whether mini-batches are differentiated one after the other or many at once."""

from typing import Literal

import torch

from lightning_curvature.batch_sharpness.pairs import PairMoments, Pairs
from lightning_curvature.batch_sharpness.problem import PAIR, DrawOptions, SharpnessProblem
from lightning_curvature.distributed.reduce import sum_over_ranks
from lightning_curvature.losses.stacked import forward_operations
from lightning_curvature.reporting.loggers import warn

BatchesAtOnce = int | Literal["auto"]

# "auto" takes this many at once, which are as many as `min_batches` asks for, ...
_COUNT = 16
# ... where parameters and floating-point operations of a forward are at most so many. On a CPU, MLPs, CNNs and
# transformers below both were 1.1 to 3.4 times as fast at once, and slower above 200 thousand parameters, where copies
# of them no longer fit into the cache (docs/benchmark_batch_sharpness.md).
_PARAMETERS, _OPERATIONS = 100_000, 25_000_000
# Relative difference that both ways may have, which is rounding: at most 4e-6 was seen in float32.
_AGREEMENT = 1e-3


class AtOnceChoice:
    """Chooses once, for as long as mini-batches are those of one population, and for all ranks together.

    The first pair is measured in both ways, which must agree: a step that ``torch.vmap`` cannot follow, that draws
    from Python's random numbers, or that holds its parameters elsewhere too, is measured in turn.

    Args:
        wanted: how many mini-batches at once, 1 for none, or "auto": 16 of small models.
    """

    def __init__(self, wanted: BatchesAtOnce) -> None:
        self._wanted = wanted
        self._pairs: int | None = None

    @property
    def taken(self) -> bool:
        """Whether mini-batches are differentiated at once; before the first measurement they are not."""
        return (self._pairs or 1) > 1

    def forget(self) -> None:
        """Choose anew at the next measurement."""
        self._pairs = None

    def pairs(self, options: DrawOptions, problem: SharpnessProblem, in_turn: Pairs, at_once: Pairs) -> int:
        """Return how many pairs a rank measures at once; 1 where each is measured in turn. One collective at first."""
        if self._pairs is None:
            count = _COUNT if self._wanted == "auto" else self._wanted
            pays = count > 1 and problem.can_be_stacked and bool(set(options.quantities) - {"lambda_max_b"})
            if pays:
                vote = torch.tensor(float(self._pays(problem, in_turn, at_once)), dtype=torch.float64)
                reduce = sum_over_ranks(problem.trainer)
                votes = vote if reduce is None else reduce(vote.to(problem.trainer.strategy.root_device))
                pays = round(float(votes)) == problem.trainer.world_size
            self._pairs = (count + 1) // PAIR if pays else 1
        return self._pairs

    def _pays(self, problem: SharpnessProblem, in_turn: Pairs, at_once: Pairs) -> bool:
        try:
            if self._wanted == "auto" and not _is_small(problem):
                return False
            one, other = (way.observe([0], ["modified_batch_sharpness"])[0] for way in (in_turn, at_once))
            if alike(one, other):
                return True
            reason = "its gradients come out differently there"
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if self._wanted != "auto":
            warn(
                f"batches_at_once must be 1 for a training step that torch.vmap cannot repeat, got {self._wanted} "
                f"({reason}): mini-batches are measured one after the other."
            )
        return False


def alike(one: PairMoments, other: PairMoments) -> bool:
    """Whether two measurements of one pair are the same but for rounding."""
    if one.zero_gradients != other.zero_gradients or one.moments.keys() != other.moments.keys():
        return False
    return all(torch.allclose(one.moments[q][:3], other.moments[q][:3], rtol=_AGREEMENT, atol=0.0) for q in one.moments)


def _is_small(problem: SharpnessProblem) -> bool:
    """Whether launching a mini-batch takes longer than computing it."""
    if sum(p.numel() for p in problem.parameters) > _PARAMETERS:
        return False
    assert problem.population is not None
    drawn = problem.population.draw(problem.key, 0)
    parts = problem.loss.parts_of(drawn, sum(probe.size for probe in drawn))
    return sum(forward_operations(part.evaluate) for part in parts) <= _OPERATIONS
