"""Reading a probe set leaves the run unchanged, and gives the same bits each time."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_curvature.data.probe_set import ProbeSet, read_probe_set
from tests.helpers.reading_states import (
    GLOBAL,
    IN_PROCESS,
    LOADERS,
    assert_equal,
    everything,
    fit,
)
from tests.helpers.runs import make_trainer


class Reader(pl.Callback):
    def __init__(self) -> None:
        self.sets: list[ProbeSet] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx in (0, 2):
            self.sets.append(read_probe_set(trainer, samples=7, seed=5))


def bits(probes: ProbeSet) -> list[Tensor]:
    return [probe.batch for probe in probes.batches]


@pytest.mark.parametrize("name", LOADERS)
def test_training_does_not_notice(name: str) -> None:
    reader = Reader()
    assert_equal(fit(LOADERS[name](), reader), fit(LOADERS[name]()))
    assert len(reader.sets) == 4
    for again in reader.sets[1:]:
        assert_equal(bits(again), bits(reader.sets[0]))


@pytest.mark.parametrize("name", IN_PROCESS)
def test_a_later_process_reads_the_same_bits(name: str) -> None:
    trainer = make_trainer()
    first = read_probe_set(trainer, LOADERS[name](), samples=7, seed=5)
    torch.rand(3), GLOBAL.rand(3), random.random()
    later = read_probe_set(trainer, LOADERS[name](first_draws=2), samples=7, seed=5)
    assert_equal(bits(later), bits(first))
    other = read_probe_set(trainer, LOADERS[name](), samples=7, seed=6)
    drawn = [[batch.reshape(-1, 8)[:, 1:] for batch in bits(one)] for one in (first, other)]
    assert not set(torch.cat(drawn[0]).flatten().tolist()) & set(torch.cat(drawn[1]).flatten().tolist())


def test_each_sample_has_different_draws_that_do_not_depend_on_its_batch() -> None:
    trainer = make_trainer()
    sets = [read_probe_set(trainer, LOADERS["subset"](), samples=None, batch_size=size) for size in (1, 4, 11)]
    whole = [torch.cat(bits(one)) for one in sets]
    assert torch.equal(whole[0], whole[1])
    assert torch.equal(whole[0], whole[2])
    for column in whole[0].T:
        assert len(column.unique()) == 11


@pytest.mark.parametrize("name", LOADERS)
def test_states_are_put_back_when_reading_fails(name: str) -> None:
    loader = LOADERS[name](bad=10)
    before = everything(loader)
    with pytest.raises(OSError, match="no such sample"):
        read_probe_set(make_trainer(), loader, samples=96)
    assert everything(loader) == before


class Cursor:
    """A custom loader that continues where the last epoch ended."""

    def __init__(self) -> None:
        self.position = 0

    def __iter__(self) -> Iterator[Tensor]:
        for _ in range(4):
            self.position += 1
            yield torch.full((2,), float(self.position))


def test_a_custom_loader_is_read_from_a_copy() -> None:
    reader, read, alone = Reader(), Cursor(), Cursor()
    assert_equal(fit(read, reader), fit(alone))
    assert read.position == alone.position == 8
    # Lightning prefetches one batch.
    assert [batch.tolist() for batch in bits(reader.sets[0])] == [[3.0] * 2, [4.0] * 2, [5.0] * 2, [6.0] * 2]


class Origin(IterableDataset[Tensor]):
    """Gives the number of the process that reads it."""

    def __iter__(self) -> Iterator[Tensor]:
        return iter([torch.tensor(os.getpid())])


def test_data_is_read_in_this_process() -> None:
    loader = DataLoader(Origin(), num_workers=1, persistent_workers=True, pin_memory=True, timeout=60)
    (probe,) = read_probe_set(make_trainer(), loader, samples=1).batches
    assert probe.batch.tolist() == [os.getpid()]


def test_the_dataset_of_the_workers_has_opened_no_file() -> None:
    loader = LOADERS["worker"]()
    probes = read_probe_set(make_trainer(), loader, samples=None)
    assert torch.cat(bits(probes))[:, 0].tolist() == list(range(12))
    assert loader.dataset.dataset.file is None


def test_batches_do_not_share_memory_with_the_dataset() -> None:
    data = [torch.ones(2) * i for i in range(4)]
    for loader in (data, DataLoader(data, batch_size=None), DataLoader(data, batch_size=2, collate_fn=tuple)):
        probes = read_probe_set(make_trainer(), loader, samples=None)
        held = [tensor for probe in probes.batches for tensor in ([probe.batch], probe.batch)[len(probes.batches) == 2]]
        assert [tensor.tolist() for tensor in held] == [[i, i] for i in range(4)]
        assert not {tensor.data_ptr() for tensor in held} & {tensor.data_ptr() for tensor in data}
