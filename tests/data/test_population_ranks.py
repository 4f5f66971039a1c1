"""Draws of several ranks: the same mini-batches of samples on any number of ranks; of batches, each draws from its."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from torch.utils.data import DataLoader, WeightedRandomSampler

from lightning_curvature.data.population import read_population
from tests.helpers.population import assert_same, numbers
from tests.helpers.reading_ranks import NUMBERS, WHOLE, Noisy, Sharded, distributed, read_all


def populate_all(ranks: int, make: Callable[[int], Any], given: Any = False, **options: Any) -> list[Any]:
    """Return the population or the error of each rank."""
    return read_all(ranks, make, given, epoch=9, reader=read_population, **options)


def augmented(rank: int) -> Any:
    return DataLoader(Noisy(), batch_size=2, shuffle=True)


def test_the_same_mini_batches_on_any_number_of_ranks() -> None:
    options = {"samples": 9, "batch_size": 5, "micro_batch_size": 2}
    (alone,) = populate_all(1, augmented, **options)
    expected = [alone.draw(3, number) for number in range(6)]
    for ranks in (2, 3, 4):
        for rank, population in enumerate(populate_all(ranks, augmented, **options)):
            assert (population.total, population.batch_size) == (9, 5)
            # Ranks take different numbers.
            for number in range(rank, 6, ranks):
                for one, other in zip(population.draw(3, number), expected[number], strict=True):
                    assert (one.size, one.seed) == (other.size, other.seed)
                    assert torch.equal(one.batch, other.batch)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_share_the_whole_as_they_share_a_probe_set(ranks: int) -> None:
    populations = populate_all(ranks, augmented, samples=7, batch_size=5)
    sets = read_all(ranks, augmented, samples=7)
    for population, probe_set in zip(populations, sets, strict=True):
        assert_same(population.whole(), probe_set)
    found = {int(index) for one in populations for part in one.whole().batches for index, _ in part.batch}
    assert len(found) == 7


def test_a_mini_batch_is_as_large_as_the_data_of_all_ranks() -> None:
    def make(rank: int) -> Any:
        return DataLoader(NUMBERS, batch_size=2, sampler=distributed(rank))

    first, second = populate_all(2, make)
    # Batch size, accumulation, ranks.
    assert first.batch_size == second.batch_size == 2 * 2 * 2
    assert [part.size for part in first.draw(0, 4)] == [2, 2, 2, 2]
    assert numbers(first.draw(0, 4)) == numbers(second.draw(0, 4))
    # Also with a given loader of another batch size.
    larger = DataLoader(NUMBERS, batch_size=5)
    assert populate_all(2, make, given=larger)[0].batch_size == 8


def test_by_the_weights_of_a_sampler_that_lightning_has_sharded() -> None:
    def make(rank: int) -> Any:
        sampler = WeightedRandomSampler([0.0, 1.0, 0.0, 1e9, 0.0], num_samples=20)
        return DataLoader(NUMBERS, 2, sampler=DistributedSamplerWrapper(sampler, num_replicas=2, rank=rank))

    for population in populate_all(2, make):
        assert (population.total, population.replacement, population.batch_size) == (2, True, 8)
        # Another sample is among them with probability 8e-9.
        assert numbers(population.draw(0, 0)) == [3] * 8


@pytest.mark.parametrize(
    ("make", "given", "options", "batch_size", "held"),
    [
        (lambda rank: WHOLE, True, {}, None, [{0, 2, 4}, {1, 3}]),
        (lambda rank: DataLoader(WHOLE[:4] if rank else WHOLE, batch_size=None), False, {}, None,
         [{0, 1, 2, 3, 4}, {0, 1, 2, 3}]),
        (lambda rank: DataLoader(Sharded(rank), batch_size=1), True, {"samples": 6, "batch_size": 1}, 1,
         [{0, 1, 2}, {20, 21, 22}]),
    ],
    ids=["given", "own of each", "iterable"],
)  # fmt: skip
def test_each_rank_draws_from_the_batches_it_has(
    make: Callable[[int], Any], given: bool, options: dict[str, Any], batch_size: int | None, held: list[set[int]]
) -> None:
    populations = populate_all(2, make, given, **options)
    size = populations[0].total
    for rank, (population, expected) in enumerate(zip(populations, held, strict=True)):
        assert (population.total, population.batch_size) == (size, batch_size)
        drawn = [population.draw(0, number) for number in range(rank, 100, 2)]
        # Accumulation and ranks make four batches; a given loader one.
        assert {len(parts) for parts in drawn} == {1 if given else 4}
        scale = 1 if options else 2  # WHOLE has two samples in a batch
        # Each of at most five is missing with probability at most (1 − 1/5)^50.
        assert {int(part.batch[0]) // scale for parts in drawn for part in parts} == expected


def test_an_error_on_one_rank_ends_the_reading_on_all() -> None:
    def make(rank: int) -> Any:
        data = [0, 1, 2, 3] if rank == 0 else Broken()
        return DataLoader(data, batch_size=1)  # type: ignore[arg-type]

    good, bad = populate_all(2, make)
    assert isinstance(bad, OSError)
    assert isinstance(good, RuntimeError)
    assert str(good) == "reading the probe set failed on another rank; see that rank's log"


class Broken:
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        raise OSError("no such sample")


def test_fewer_samples_than_ranks() -> None:
    for error in populate_all(3, lambda rank: DataLoader([5, 6]), given=True):
        assert "at least one sample for each rank, got 1 + 1 + 0: give more data" in str(error)
