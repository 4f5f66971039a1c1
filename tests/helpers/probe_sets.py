"""Datasets whose samples are numbers, so that a probe set shows which it took."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    Sampler,
)

NUMBERS = list(range(10))


WHOLE = [torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5, 6]), torch.tensor([7]), torch.tensor([8, 9])]


class Plain(pl.LightningModule):
    """Trains on numbers in batches of any form."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.weight * batch_idx

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Odd(Sampler[int]):
    """A custom sampler."""

    def __iter__(self) -> Iterator[int]:
        return iter([7, 3, 9, 3, 1])

    def __len__(self) -> int:
        return 5


class Endless(Sampler[int]):
    def __iter__(self) -> Iterator[int]:
        return itertools.cycle([5, 2])


class Growing:
    """A custom batch sampler: batches of 1, 2, 3 and 4 samples."""

    def __iter__(self) -> Iterator[list[int]]:
        return iter([[0], [1, 2], [3, 4, 5], [6, 7, 8, 9]])

    def __len__(self) -> int:
        return 4


class Stream(IterableDataset[int]):
    def __init__(self, end: int | None = None) -> None:
        self.end = end

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.end)) if self.end is not None else itertools.count()


class Doubled(DataLoader[Any]):
    """A loader class that changes its batches."""

    def __iter__(self) -> Any:
        return (2 * batch for batch in super().__iter__())
