"""What a loader's sampler draws from, in which order, and who makes the batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_curvature.data.samplers import cuts_batches, indices_of, is_iterable, is_ordered, source_sampler

DATA = list(range(6))


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(DATA)


class Odd(Sampler[int]):
    """Draws the odd ones, one of them twice."""

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[int]:
        return iter([5, 1, 3, 1])


class Names(Odd):
    def __iter__(self) -> Iterator[Any]:
        return iter("abcd")


class Without(Sampler[int]):
    """Says no length."""

    def __iter__(self) -> Iterator[int]:
        return iter(DATA)


SAMPLERS: dict[str, tuple[Any, list[int] | None]] = {
    "sequential": (SequentialSampler(DATA), DATA),
    "random": (RandomSampler(DATA), DATA),
    "subset": (SubsetRandomSampler([4, 2]), [2, 4]),
    "weighted": (WeightedRandomSampler([0.0, 1.0, 0.0, 2.0], 4), [1, 3]),
    "distributed": (DistributedSampler(DATA, 2, 0), DATA),  # type: ignore[arg-type]
    "own": (Odd(), [1, 3, 5]),
    "names": (Names(), None),
    "without length": (Without(), None),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_indices(name: str) -> None:
    sampler, expected = SAMPLERS[name]
    found = indices_of(sampler)
    assert (found if found is None else list(found)) == expected


@pytest.mark.parametrize(
    ("loader", "ordered"),
    [
        (DataLoader(DATA), True),  # type: ignore[arg-type]
        (DataLoader(DATA, shuffle=True), False),  # type: ignore[arg-type]
        (DataLoader(DATA, sampler=DistributedSampler(DATA, 2, 0, shuffle=False)), True),  # type: ignore[arg-type]
        (DataLoader(DATA, sampler=DistributedSampler(DATA, 2, 0, shuffle=True)), False),  # type: ignore[arg-type]
        (DataLoader(DATA, sampler=DistributedSamplerWrapper(Odd(), 2, 0, shuffle=False)), False),  # type: ignore[arg-type]
        (DataLoader(DATA, sampler=Odd()), False),  # type: ignore[arg-type]
        (DataLoader(Stream()), True),
        ([torch.zeros(1)], True),
    ],
)
def test_order(loader: Any, ordered: bool) -> None:
    assert is_ordered(loader) is ordered


def test_the_sampler_inside_one_that_shards() -> None:
    inner = Odd()
    wrapped = DataLoader(DATA, sampler=DistributedSamplerWrapper(inner, 2, 0))  # type: ignore[arg-type]
    assert source_sampler(wrapped) is inner
    plain = DataLoader(DATA, sampler=inner)  # type: ignore[arg-type]
    assert source_sampler(plain) is inner
    shards = DistributedSampler(DATA, 2, 0)  # type: ignore[arg-type]
    assert source_sampler(DataLoader(DATA, sampler=shards)) is shards  # type: ignore[arg-type]


class Own(DataLoader[Any]):
    def __iter__(self) -> Any:
        return super().__iter__()


@pytest.mark.parametrize(
    ("loader", "cuts"),
    [
        (DataLoader(DATA, batch_size=2), True),  # type: ignore[arg-type]
        (DataLoader(DATA, batch_sampler=BatchSampler(Odd(), 2, False)), True),  # type: ignore[arg-type]
        (DataLoader(DATA, batch_size=None), False),  # type: ignore[arg-type]
        (DataLoader(DATA, batch_sampler=[[0, 1], [2]]), False),  # type: ignore[arg-type]
        (Own(DATA, batch_size=2), False),  # type: ignore[arg-type]
        ([DATA], False),
    ],
)
def test_who_makes_the_batches(loader: Any, cuts: bool) -> None:
    assert cuts_batches(loader) is cuts


def test_iterable() -> None:
    assert is_iterable(DataLoader(Stream()))
    assert not is_iterable(DataLoader(DATA))  # type: ignore[arg-type]
    assert not is_iterable([DATA])
