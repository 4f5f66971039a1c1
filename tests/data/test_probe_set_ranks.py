"""Shares of a probe set: each sample lies on one rank, and batches are the same on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, DistributedSampler, SubsetRandomSampler

from tests.helpers.reading_ranks import NUMBERS, WHOLE, Noisy, Sharded, batches, distributed, read_all, shares

FIVES = [[NUMBERS[:5], NUMBERS[10:]], [NUMBERS[5:10]]]


def wrapped(rank: int) -> Any:
    return DistributedSamplerWrapper(SubsetRandomSampler([4, 8, 2, 6, 0]), num_replicas=2, rank=rank, shuffle=True)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (
            lambda rank: DataLoader(NUMBERS, batch_size=2, shuffle=True),
            [[[0, 1], [4, 5], [8, 9]], [[2, 3], [6, 7], [10]]],
        ),
        (
            lambda rank: DataLoader(NUMBERS, batch_size=5, sampler=distributed(rank)),
            [[NUMBERS[:5], [10]], [NUMBERS[5:10]]],
        ),
        (lambda rank: DataLoader(NUMBERS, batch_size=2, sampler=wrapped(rank)), [[[0, 2], [8]], [[4, 6]]]),
    ],
    ids=["shuffled", "distributed", "distributed subset"],
)
@pytest.mark.parametrize("given", [False, True])
def test_ranks_share_whole_batches(make: Callable[[int], Any], expected: list[list[list[int]]], given: bool) -> None:
    assert batches(read_all(2, make, given)) == expected


def test_a_limited_epoch_is_that_of_all_ranks() -> None:
    def make(rank: int) -> Any:
        return DataLoader(NUMBERS, batch_size=2, sampler=distributed(rank, shuffle=False))

    assert batches(read_all(2, make, epoch=2)) == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]


def test_the_same_batches_on_any_number_of_ranks() -> None:
    def make(rank: int) -> Any:
        return DataLoader(Noisy(), batch_size=2, shuffle=True)

    sets = [read_all(ranks, make, samples=7) for ranks in (1, 2, 3, 4)]
    counts = [[[probe.size for probe in one.batches] for one in several] for several in sets]
    assert counts == [[[2, 2, 2, 1]], [[2, 2], [2, 1]], [[2, 1], [2], [2]], [[2], [2], [2], [1]]]
    assert [several[0].rounds for several in sets] == [4, 2, 2, 1]
    # Samples, their augmentation, and the seed of what hooks draw for the batch.
    whole = [sorted((p.seed, p.batch.tolist()) for one in several for p in one.batches) for several in sets]
    assert all(found == whole[0] for found in whole)
    assert len({index for _, batch in whole[0] for index, _ in batch}) == 7


def whole(rank: int) -> Any:
    return DataLoader(WHOLE, batch_size=None, sampler=DistributedSampler(WHOLE, 2, rank, shuffle=False))  # type: ignore


@pytest.mark.parametrize(
    ("make", "given", "samples", "expected"),
    [
        (lambda rank: WHOLE, True, None, [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7]]),
        (lambda rank: WHOLE, True, 6, [[0, 1, 4, 5], [2, 3, 6, 7]]),
        # The sampler also gives rank 1 the first batch.
        (whole, False, None, [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7]]),
        (whole, True, None, [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7]]),
        (lambda rank: DataLoader(WHOLE[rank * 2 : 4 - rank], batch_size=None), False, None, [[*range(8)], [4, 5]]),
        (lambda rank: DataLoader(Sharded(rank), batch_size=2), False, 9, [[0, 1, 2, 3, 4, 5], [20, 21, 22]]),
        (lambda rank: DataLoader(Sharded(rank), batch_size=2), True, 4, [[0, 1], [20, 21]]),
    ],
    ids=["given", "given, some", "distributed", "given distributed", "own of each", "iterable", "given iterable"],
)
def test_ranks_share_a_given_loader_or_read_different_ones(
    make: Callable[[int], Any], given: bool, samples: int | None, expected: list[list[int]]
) -> None:
    assert shares(read_all(2, make, given, samples=samples)) == expected


def test_a_custom_sampler_gives_the_samples_of_its_rank() -> None:
    def make(rank: int) -> Any:
        return DataLoader(NUMBERS, batch_size=2, sampler=[rank, 5 + rank, 2 + rank])

    assert shares(read_all(2, make)) == [[0, 5, 2], [1, 6, 3]]


def test_an_error_on_one_rank_ends_the_reading_on_all() -> None:
    def make(rank: int) -> Any:
        return DataLoader([0, 1, 2, "three"], batch_size=1, collate_fn=lambda rows: torch.tensor([rows[0] + 0]))

    good, bad = read_all(2, make)
    assert isinstance(bad, TypeError)
    assert str(good) == "reading the probe set failed on another rank; see that rank's log"
    assert isinstance(good, RuntimeError)


@pytest.mark.parametrize(
    ("make", "samples", "sentence"),
    [
        (lambda rank: [], 2, r"at least the number of ranks, 3, so that each has one, got 2: raise it\."),
        (lambda rank: DataLoader([5, 6]), None, r"at least one sample for each rank, got 1 \+ 1 \+ 0: give more data"),
    ],
)
def test_too_few_samples_for_the_ranks(make: Callable[[int], Any], samples: int | None, sentence: str) -> None:
    for rank in range(3):
        with pytest.raises(MisconfigurationException, match=sentence):
            raise read_all(3, make, samples=samples)[rank]
