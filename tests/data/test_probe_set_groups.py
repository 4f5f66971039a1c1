"""Groups of batches of a probe set: whole on one rank, or shared by several ranks, which all ranks know."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from torch.utils.data import DataLoader

from lightning_curvature.data.probe_set import ProbeSet
from tests.helpers.reading_ranks import NUMBERS, WHOLE, batches, read_all, shares


def of_size(batch_size: int) -> Callable[[int], Any]:
    return lambda rank: DataLoader(NUMBERS, batch_size=batch_size, shuffle=True)


@pytest.mark.parametrize(
    ("ranks", "batch_size", "group_size", "expected"),
    [
        (1, 2, 4, [[(0, [0, 1]), (0, [2, 3]), (0, [4, 5]), (0, [6, 7]), (1, [8, 9]), (1, [10])]]),
        (2, 2, 2, [[(0, [0, 1]), (0, [2, 3]), (2, [8, 9]), (2, [10])], [(1, [4, 5]), (1, [6, 7])]]),
        (3, 2, 2, [[(0, [0, 1]), (0, [2, 3])], [(1, [4, 5]), (1, [6, 7])], [(2, [8, 9]), (2, [10])]]),
        (2, 2, 4, [[(0, [0, 1]), (0, [2, 3]), (0, [4, 5]), (0, [6, 7])], [(1, [8, 9]), (1, [10])]]),
        (2, 4, 1, [[(0, [0, 1, 2, 3]), (2, [8, 9, 10])], [(1, [4, 5, 6, 7])]]),
    ],
)
def test_groups_of_batches_stay_whole_on_one_rank(
    ranks: int, batch_size: int, group_size: int, expected: list[list[tuple[int, list[int]]]]
) -> None:
    sets = read_all(ranks, of_size(batch_size), group_size=group_size)
    shares(sets)
    assert [[(probe.group, probe.batch.tolist()) for probe in one.batches] for one in sets] == expected
    assert not any(probe.spread for one in sets for probe in one.batches)
    assert [one.spread for one in sets] == [None] * ranks


@pytest.mark.parametrize(
    ("ranks", "batch_size", "group_size", "expected", "spread"),
    [
        # Two groups for three ranks: ranks take whole batches.
        (3, 2, 4, [[(0, [0, 1]), (0, [6, 7])], [(0, [2, 3]), (1, [8, 9])], [(0, [4, 5]), (1, [10])]], 2),
        # One group for two.
        (2, 4, 9, [[(0, [0, 1, 2, 3]), (0, [8, 9, 10])], [(0, [4, 5, 6, 7])]], 1),
        # Three batches for four ranks, one for two: ranks take samples of each batch.
        (4, 4, 1, [[(0, [0]), (1, [4]), (2, [8])], [(0, [1]), (1, [5]), (2, [9])], [(0, [2]), (1, [6]), (2, [10])],
                   [(0, [3]), (1, [7])]], 3),
        (2, 11, 3, [[(0, NUMBERS[::2])], [(0, NUMBERS[1::2])]], 1),
    ],
)  # fmt: skip
def test_groups_that_ranks_share(
    ranks: int, batch_size: int, group_size: int, expected: list[list[tuple[int, list[int]]]], spread: int
) -> None:
    sets = read_all(ranks, of_size(batch_size), group_size=group_size)
    assert sorted(itertools.chain(*shares(sets))) == NUMBERS
    assert [[(probe.group, probe.batch.tolist()) for probe in one.batches] for one in sets] == expected
    assert all(probe.spread for one in sets for probe in one.batches)
    # Also on a rank that holds nothing of the last group.
    assert [one.spread for one in sets] == [spread] * ranks


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8, 11])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 11])
@pytest.mark.parametrize("group_size", [1, 3])
def test_every_rank_has_samples_where_there_are_as_many(ranks: int, batch_size: int, group_size: int) -> None:
    sets = read_all(ranks, of_size(batch_size), group_size=group_size)
    assert all(isinstance(one, ProbeSet) for one in sets), sets
    found = shares(sets)
    assert sorted(itertools.chain(*found)) == NUMBERS
    assert all(found)
    # A group lies on one rank, or the set counts it as spread.
    holders: dict[int, set[int]] = {}
    for rank, one in enumerate(sets):
        for probe in one.batches:
            holders.setdefault(probe.group, set()).add(rank)
            assert set(probe.batch.tolist()) <= set(
                NUMBERS[probe.group * group_size * batch_size : (probe.group + 1) * group_size * batch_size]
            )
    shared = any(len(one) > 1 for one in holders.values())
    assert not shared or sets[0].spread == len(holders)


def test_without_indices_each_rank_has_its_groups() -> None:
    sets = read_all(2, lambda rank: WHOLE, True, group_size=2)
    assert batches(sets) == [[[0, 1], [4, 5], [8, 9]], [[2, 3], [6, 7]]]
    assert [[probe.group for probe in one.batches] for one in sets] == [[0, 0, 1], [0, 0]]
    assert [one.spread for one in sets] == [None, None]
