"""Data is read from copies, and every generator within reach is seeded and put back."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset

from lightning_curvature.data.copies import DataRandomness, fresh_copy, mixed

CPU = torch.device("cpu")


class Transform:
    """Draws from generators of its own, and counts its calls."""

    def __init__(self) -> None:
        self.torch, self.numpy, self.python = torch.Generator(), np.random.default_rng(1), random.Random(1)
        self.legacy = np.random.RandomState(1)
        self.calls, self.seen = 0, list[int]()

    def __call__(self, index: int) -> list[float]:
        self.calls += 1
        self.seen.append(index)
        return [
            float(torch.rand((), generator=self.torch)),
            float(self.numpy.random()),
            self.python.random(),
            float(self.legacy.rand()),
            float(torch.rand(())),
            random.random(),
            float(np.random.rand()),  # noqa: NPY002
        ]


class Samples(Dataset[Any]):
    """Reaches its transform through a closure, in a list, in a namespace."""

    def __init__(self) -> None:
        transform = Transform()
        self.bag = SimpleNamespace(steps=[lambda index: transform(index)])
        self.transform = lambda: transform

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        return self.bag.steps[0](index)


def test_what_reading_draws_and_counts_is_put_back_also_after_an_error() -> None:
    data = Samples()
    expected = [Samples()[0] for _ in range(1)]
    torch.manual_seed(1), random.seed(1), np.random.seed(1)  # noqa: NPY002
    states = torch.get_rng_state(), random.getstate()
    randomness = DataRandomness(CPU, Subset(data, [0, 1]))
    with pytest.raises(OSError, match="gone"), randomness.kept():
        first = [data[0], data[1]]
        raise OSError("gone")
    assert data.transform().calls == 0
    assert data.transform().seen == []
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert [data[0], data[1]] == first
    assert first[0][:4] == expected[0][:4]  # of the transform's own generators


def test_equal_keys_seed_equally_and_others_otherwise() -> None:
    def drawn(*key: int) -> list[float]:
        data = Samples()
        randomness = DataRandomness(CPU, data)
        with randomness.kept():
            randomness.seed(*key)
            return data[0]

    one, again, other = drawn(1, 2), drawn(1, 2), drawn(1, 3)
    assert one == again
    assert all(a != b for a, b in zip(one, other, strict=True))


def test_seeds_of_neighbouring_keys_are_unrelated() -> None:
    seeds = [mixed(0, key) for key in range(2000)]
    assert len(set(seeds)) == 2000
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert mixed(1, 2) != mixed(12) != mixed(2, 1)
    # Bits are fair coins: the mean of 2000 of them is within four deviations of one half.
    for bit in range(32):
        assert abs(sum(seed >> bit & 1 for seed in seeds) / 2000 - 0.5) < 4 * 0.5 / 2000**0.5


class Counting(Dataset[Any]):
    """Counts its reads."""

    def __init__(self) -> None:
        self.reads, self.numbers = 0, torch.arange(6)

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Any:
        self.reads += 1
        return self.numbers[index]


class Endless(IterableDataset[Any]):
    """Goes on from where it is."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Any:
        while True:
            self.at += 1
            yield self.at


@pytest.mark.parametrize("inside", [lambda d: d, lambda d: ConcatDataset([d]), lambda d: Subset(d, range(6))])
def test_a_copy_reads_without_moving_the_loader(inside: Callable[[Any], Any]) -> None:
    data = Counting()
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(inside(data), batch_size=2, shuffle=True, generator=generator, num_workers=2)
    before = generator.get_state()
    copied = fresh_copy(loader)
    assert copied.num_workers == 0
    batches = [batch.tolist() for batch in copied]
    assert sorted(number for batch in batches for number in batch) == list(range(6))
    assert data.reads == 0
    assert torch.equal(generator.get_state(), before)
    # In the order in which the loader itself would have read.
    assert [batch.tolist() for batch in fresh_copy(loader)] == batches
    # The data itself is shared.
    holder = copied.dataset.datasets[0] if isinstance(copied.dataset, ConcatDataset) else copied.dataset
    holder = holder.dataset if isinstance(holder, Subset) else holder
    assert holder.numbers is data.numbers


def test_a_stream_is_copied_where_it_is() -> None:
    stream = Endless()
    iter_ = iter(stream)
    next(iter_)
    loader = DataLoader(stream, batch_size=2)
    assert next(iter(fresh_copy(loader))).tolist() == [2, 3]
    assert stream.at == 1


def test_a_sequence_of_batches_is_itself_and_a_loader_that_cannot_be_copied_is_refused() -> None:
    batches = [torch.zeros(1)]
    assert fresh_copy(batches) is batches
    sentence = r"must be one that can be copied, .*, got generator \(TypeError: .*\): give probe_dataloader= a list"
    with pytest.raises(MisconfigurationException, match=sentence):
        fresh_copy(number for number in range(3))
