"""Loaders whose datasets draw and count, and what a reading might leave changed in them."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, Subset, SubsetRandomSampler

from tests.helpers.runs import make_trainer

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
