"""Shares of a probe set: each sample lies on one rank, and batches are the same on any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, SubsetRandomSampler

from lightning_curvature.data.probe_set import ProbeSet, read_probe_set

NUMBERS = list(range(11))
FIVES = [[NUMBERS[:5], NUMBERS[10:]], [NUMBERS[5:10]]]


class Noticed(Exception):
    """Ends a reading at its collective."""


def read_all(
    ranks: int,
    make: Callable[[int], Any],
    given: Any = False,
    epoch: float = math.inf,
    reader: Callable[..., Any] = read_probe_set,
    **options: Any,
) -> list[Any]:
    """Return what the reader returns or raises on each rank.

    Each rank reads twice: first to collect what the ranks send, then with the sum. ``given`` is a loader, or whether
    that of the Trainer is given.
    """
    sent: list[Tensor] = []

    def send(values: Tensor, reduce_op: str) -> Tensor:
        sent.append(values)
        raise Noticed

    def receive(values: Tensor, reduce_op: str) -> Tensor:
        return torch.stack(sent).mean(0)

    def read(rank: int, reduce: Any) -> Any:
        strategy = SimpleNamespace(root_device=torch.device("cpu"), reduce=reduce)
        loader = make(rank)
        probed = given if isinstance(given, DataLoader) else loader if given else None
        trainer: Any = SimpleNamespace(
            world_size=ranks,
            global_rank=rank,
            strategy=strategy,
            train_dataloader=loader,
            num_training_batches=epoch,
            overfit_batches=0,
            accumulate_grad_batches=2,
        )
        try:
            return reader(trainer, probed, **({"samples": None} | options))
        except Exception as error:
            return error

    first = [read(rank, send) for rank in range(ranks)]
    # A rank that leaves alone would leave the others waiting.
    assert len(sent) in (0, ranks)
    if not sent:
        return first
    return [read(rank, receive) for rank in range(ranks)]


def shares(sets: list[ProbeSet]) -> list[list[int]]:
    """Return the samples of each rank; check the counts over all ranks."""
    for probes in sets:
        assert all(probe.size == len(probe.batch) for probe in probes.batches)
        assert probes.total == sum(probe.size for one in sets for probe in one.batches)
        assert probes.rounds == max(len(one.batches) for one in sets)
    return [[int(i) for probe in probes.batches for i in probe.batch.flatten()] for probes in sets]


def distributed(rank: int, **options: Any) -> Any:
    return DistributedSampler(NUMBERS, num_replicas=2, rank=rank, **options)  # type: ignore[arg-type]


def wrapped(rank: int) -> Any:
    return DistributedSamplerWrapper(SubsetRandomSampler([4, 8, 2, 6, 0]), num_replicas=2, rank=rank, shuffle=True)


def batches(sets: list[ProbeSet]) -> list[list[list[int]]]:
    """Return the samples of each batch of each rank."""
    shares(sets)
    return [[probe.batch.tolist() for probe in one.batches] for one in sets]


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


class Noisy(Dataset[Tensor]):
    """Augments its samples at random."""

    def __len__(self) -> int:
        return 11

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([float(index), torch.rand(()).item()])


class Sharded(IterableDataset[int]):
    """An iterable dataset that shards itself; rank 0 gets more samples."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __iter__(self) -> Iterator[int]:
        return iter(range(10) if self.rank == 0 else range(20, 23))


WHOLE = [torch.tensor([2 * i, 2 * i + 1]) for i in range(5)]


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
