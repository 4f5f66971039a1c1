"""Data that draws as it is read, and modules that fail in the middle of a measurement."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from tests.helpers.counting import out_of_reach
from tests.helpers.runs import Classifier, classification
from tests.helpers.setups import with_batchnorm, with_dropout


class Augmented(Dataset[Any]):
    """Draws from every generator there is, and from two of its own; counts what was read in its own order."""

    def __init__(self) -> None:
        self.x, self.y = (torch.cat(parts) for parts in zip(*classification(4), strict=True))
        self.generator, self.numpy = torch.Generator().manual_seed(3), np.random.default_rng(3)

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = random.random() + float(np.random.rand()) + float(self.numpy.random())  # noqa: NPY002
        noise += float(torch.rand(())) + float(torch.rand((), generator=self.generator))
        return self.x[index] + 0.1 * noise, self.y[index]


class Stream(IterableDataset[Any]):
    """Draws as it goes."""

    def __iter__(self) -> Iterator[Any]:
        for x, y in zip(*(torch.cat(parts) for parts in zip(*classification(4), strict=True)), strict=True):
            yield x + torch.rand(()), y


def augmented(**options: Any) -> DataLoader[Any]:
    return DataLoader(Augmented(), batch_size=8, **options)


def with_generator() -> DataLoader[Any]:
    return augmented(shuffle=True, generator=torch.Generator().manual_seed(7))


DATA: dict[str, Callable[[], DataLoader[Any]]] = {
    "augmented": augmented,
    "shuffled": lambda: augmented(shuffle=True),
    "shuffled by its own generator": with_generator,
    "stream": lambda: DataLoader(Stream(), batch_size=8),
}


class Collate:
    """Makes a batch, and counts how often, and what it has drawn."""

    def __init__(self) -> None:
        self.calls, self.drawn = 0, 0.0

    def __call__(self, rows: list[Any]) -> Any:
        self.calls += 1
        self.drawn += float(torch.rand(()))
        return torch.utils.data.default_collate(rows)


class Hooked(Classifier):
    """Augments on the device, counts what it has seen, and changes the batch in place."""

    def __init__(self) -> None:
        super().__init__(with_dropout(), lambda m: torch.optim.Adam(m.parameters(), lr=0.01))
        self.seen, self.transfers = 0, 0

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.transfers += 1
        batch[0].mul_(1.0 + random.random())
        return batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.seen += len(batch[1])
        batch[0].add_(0.1 * torch.randn_like(batch[0]))
        return batch


class Boom(RuntimeError):
    pass


class Trapped(Classifier):
    """Fails in the middle of a measurement: in another mode, flags changed, counters ahead, numbers drawn."""

    def __init__(self, trap: list[int]) -> None:
        super().__init__(with_batchnorm(), lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9))
        # Outside the module's state, which is put back: calls until it fails; the run's own calls do not count.
        self.trap = out_of_reach(trap)
        self.count, self.seen = 0, list[float]()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        # A repeated step sees a stand-in for the Trainer.
        measuring, trap = type(self._trainer) is not pl.Trainer, self.trap()
        self.count += 1
        self.network[1].eval()
        self.network[0].bias.requires_grad_(False)
        self.optimizers().param_groups[0]["lr"] *= 0.9
        logits = self(batch[0])
        self.seen.append(float(logits.sum() + torch.rand(())))
        if measuring:
            trap[0] -= 1
            if trap[0] == 0:
                raise Boom("trapped")
        self.network[1].train()
        self.network[0].bias.requires_grad_(True)
        loss = F.cross_entropy(logits, batch[1])
        self.log("train_loss", loss)
        return loss


class Unreadable(Augmented):
    """Can be read by training, which reads in order, and by nobody else, after some draws."""

    allowed: Callable[[], bool] = staticmethod(lambda: True)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        sample = super().__getitem__(index)
        if index == 5 and not self.allowed():
            raise Boom("unreadable")
        return sample
