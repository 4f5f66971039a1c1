"""Several ranks that read data, one after the other in one process."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from lightning_curvature.data.probe_set import ProbeSet, read_probe_set

NUMBERS = list(range(11))


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


def batches(sets: list[ProbeSet]) -> list[list[list[int]]]:
    """Return the samples of each batch of each rank."""
    shares(sets)
    return [[probe.batch.tolist() for probe in one.batches] for one in sets]


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
