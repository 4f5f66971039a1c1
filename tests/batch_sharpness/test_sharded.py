"""How the micro-batches of a mini-batch are shared out over ranks that measure it together."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_curvature.batch_sharpness.problem import SharpnessProblem, check_shares
from lightning_curvature.data.reading import ProbeBatch
from lightning_curvature.operators import MicroBatch


def parts_of(drawn: Sequence[ProbeBatch], total: int) -> list[MicroBatch]:
    return [MicroBatch(functools.partial(int, probe.batch), probe.size / total) for probe in drawn]


def shares(sizes: Sequence[int], ranks: int, own: bool = False) -> list[list[tuple[int, float]]]:
    """What each rank gets of a mini-batch: places of micro-batches in it, and their weights."""
    drawn = [ProbeBatch(place, size, seed=0) for place, size in enumerate(sizes)]
    population: Any = SimpleNamespace(draw=lambda key, number: drawn, own_batches=len(sizes) if own else None)
    check_shares(population, ranks)
    found = []
    for rank in range(ranks):
        unused: Any = dict.fromkeys(("curvature", "parameters", "lr", "step", "trials", "key", "on_product"))
        problem = SharpnessProblem(
            trainer=SimpleNamespace(world_size=ranks, global_rank=rank),  # type: ignore[arg-type]
            loss=SimpleNamespace(parts_of=parts_of),  # type: ignore[arg-type]
            population=population,
            sharded=True,
            **unused,
        )
        found.append([(int(part.evaluate()), part.weight) for part in problem.draw(0)])  # type: ignore[call-overload]
    return found


@pytest.mark.parametrize(
    ("sizes", "ranks", "expected"),
    [
        ((4, 4), 2, [[(0, 0.5)], [(1, 0.5)]]),
        ((2, 2, 1), 2, [[(0, 0.4), (2, 0.2)], [(1, 0.4), (2, 0.0)]]),  # as many on each, the last one again for nothing
        ((3,), 3, [[(0, 1.0)], [(0, 0.0)], [(0, 0.0)]]),
        ((4, 4, 2), 1, [[(0, 0.4), (1, 0.4), (2, 0.2)]]),
    ],
)
def test_of_the_same_draw_each_has_its_part(sizes: Any, ranks: int, expected: Any) -> None:
    assert shares(sizes, ranks) == expected


def test_of_draws_of_their_own_each_has_other_places() -> None:
    """Seeds of masks go by the places."""
    assert shares((1, 1, 1, 1), 2, own=True) == [[(0, 0.25), (1, 0.25)], [(2, 0.25), (3, 0.25)]]


def test_draws_that_cannot_be_shared_out_are_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"got 3 for 2 ranks: choose another batch_size .*\.$"):
        shares((1, 1, 1), 2, own=True)
