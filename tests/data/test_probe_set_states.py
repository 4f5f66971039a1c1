"""Reading a probe set leaves the run unchanged, and gives the same bits each time."""

from __future__ import annotations

import functools
import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, Subset, SubsetRandomSampler

from lightning_curvature.data.probe_set import ProbeSet, read_probe_set
from tests.runs import make_trainer

# numpy's global generator, which older transforms use.
GLOBAL: Any = np.random


class Augment:
    """Draws from the four generators that it holds and from the three global ones."""

    def __init__(self, first_draws: int = 0) -> None:
        self.parts = [random.Random(1), {"numpy": np.random.default_rng(2)}, np.random.RandomState(3)]
        self.torch = torch.Generator().manual_seed(4)
        for _ in range(first_draws):
            self.own()

    def own(self) -> list[float]:
        python, named, legacy = self.parts
        return [python.random(), named["numpy"].random(), legacy.random(), torch.rand((), generator=self.torch).item()]

    def __call__(self, index: int) -> Tensor:
        drawn = [random.random(), GLOBAL.random_sample(), torch.rand(()).item(), *self.own()]
        return torch.tensor([index, *drawn], dtype=torch.float64)


class Samples(Dataset[Tensor]):
    """Opens a file on first use; raises at the index ``bad``."""

    def __init__(self, first_draws: int = 0, bad: int | None = None) -> None:
        # The generators lie inside a module, a list and a partial.
        self.transform = nn.ModuleDict()
        self.transform.steps = [functools.partial(_apply, Augment(first_draws))]
        self.bad = bad
        self.file: object | None = None

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Tensor:
        self.file = self.file or object()
        sample = self.transform.steps[0](index)
        if index == self.bad:
            raise OSError("no such sample")
        return sample


def _apply(transform: Any, index: int) -> Tensor:
    return transform(index)


class Stream(IterableDataset[Tensor]):
    def __init__(self, first_draws: int = 0, bad: int | None = None) -> None:
        self.samples = Samples(first_draws, bad)

    def __iter__(self) -> Iterator[Tensor]:
        return (self.samples[i] for i in range(12))


class Shuffled(Sampler[list[int]]):
    """A batch sampler with a state: each epoch starts where the last one ended."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(8)
        self.epochs = 0

    def __iter__(self) -> Iterator[list[int]]:
        self.epochs += 1
        return iter(torch.randperm(12, generator=self.generator).reshape(4, 3).tolist())

    def __len__(self) -> int:
        return 4


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(9)


LOADERS: dict[str, Callable[..., DataLoader[Any]]] = {
    "in order": lambda **o: DataLoader(Samples(**o), batch_size=3),
    "shuffled": lambda **o: DataLoader(Samples(**o), batch_size=3, shuffle=True),
    "generator": lambda **o: DataLoader(Samples(**o), batch_size=3, shuffle=True, generator=generator()),
    "subset": lambda **o: DataLoader(Subset(Samples(**o), range(11)), batch_size=3, shuffle=True),
    "sampler": lambda **o: DataLoader(Samples(**o), 3, sampler=SubsetRandomSampler(range(12), generator())),
    "batch sampler": lambda **o: DataLoader(Samples(**o), batch_sampler=Shuffled()),
    "single": lambda **o: DataLoader(Samples(**o), batch_size=None, shuffle=True, generator=generator()),
    "iterable": lambda **o: DataLoader(Stream(**o), batch_size=3),
    "worker": lambda **o: DataLoader(
        Subset(Samples(**o), range(12)), 3, shuffle=True, num_workers=1, persistent_workers=True
    ),
}
IN_PROCESS = [name for name in LOADERS if name != "worker"]


class Watched(pl.LightningModule):
    """Records its batches, then writes into them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: list[Tensor] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.seen += [batch.clone(), torch.rand(1)]
        batch.zero_()
        return self.weight * batch_idx

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Reader(pl.Callback):
    def __init__(self) -> None:
        self.sets: list[ProbeSet] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx in (0, 2):
            self.sets.append(read_probe_set(trainer, samples=7, seed=5))


def fit(loader: Any, *callbacks: pl.Callback) -> list[Tensor]:
    """Return the batches of two epochs, and draws from the global generators afterwards."""
    pl.seed_everything(6)
    module = Watched()
    make_trainer(*callbacks, max_epochs=2).fit(module, loader)
    return [*module.seen, *global_draws()]


def global_draws() -> list[Tensor]:
    return [torch.tensor([random.random(), GLOBAL.random_sample()]), torch.rand(1)]


def assert_equal(one: list[Tensor], other: list[Tensor]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


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


def everything(loader: Any) -> list[Any]:
    data = loader.dataset.samples if isinstance(loader.dataset, Stream) else loader.dataset
    data = data.dataset if isinstance(data, Subset) else data
    augment = data.transform.steps[0].args[0]
    samplers = [getattr(loader.batch_sampler, "generator", None), getattr(loader.sampler, "generator", None)]
    owned = [one.get_state().tolist() for one in (*samplers, loader.generator) if one is not None]
    legacy = GLOBAL.get_state(), augment.parts[2].get_state()
    return [
        [owned, random.getstate(), torch.get_rng_state().tolist(), augment.torch.get_state().tolist()],
        [(state[1].tolist(), state[2]) for state in legacy],
        [augment.parts[0].getstate(), augment.parts[1]["numpy"].bit_generator.state],
        getattr(loader.batch_sampler, "epochs", None),
    ]


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
