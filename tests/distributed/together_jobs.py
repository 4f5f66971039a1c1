"""What two processes add up and learn of each other: sums, failures of one or both, means, causes."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_curvature.data.position import Bookmark
from lightning_curvature.data.probe_set import read_probe_set
from lightning_curvature.distributed.together import attempt_together, cause_together, means_together, together
from lightning_curvature.monitors.protocol import Prepared, prepare_together


def trainer(rank: int, ranks: int) -> Any:
    """The three attributes of a Trainer that the functions read."""
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    return SimpleNamespace(global_rank=rank, world_size=ranks, strategy=strategy)


def parts(rank: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """A matrix and a scalar, other ones on each rank."""
    return {"b": torch.arange(6, dtype=dtype).view(2, 3) + rank, "a": torch.tensor(1.5 + rank, dtype=dtype)}


def sums(rank: int, ranks: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.float64):
        own = parts(rank, dtype)
        empty = {name: torch.zeros_like(part) for name, part in own.items()}
        with mock.patch.object(dist, "all_reduce", side_effect=dist.all_reduce) as reduce:
            found[str(dtype)] = together(trainer(rank, ranks), lambda own=own: own, empty, "adding")  # type: ignore[misc]
        found[f"{dtype} collectives"] = reduce.call_count
    return found


def _failing(rank: int, ranks: int, errors: dict[int, Exception]) -> tuple[str, int, bool]:
    """What a rank learns where some ranks raise."""

    def make() -> dict[str, Tensor]:
        if rank in errors:
            raise errors[rank]
        return parts(rank)

    empty = {name: torch.full_like(part, torch.nan) for name, part in parts(rank).items()}
    outcome = attempt_together(trainer(rank, ranks), make, empty, "adding")
    with pytest.raises(type(outcome.error), match=str(outcome.error)):  # type: ignore[arg-type]
        together(trainer(rank, ranks), make, empty, "adding")
    return f"{type(outcome.error).__name__}: {outcome.error}", outcome.failed, outcome.lacking


def one_fails(rank: int, ranks: int) -> Any:
    return _failing(rank, ranks, {1: RuntimeError("out of memory")})


def one_is_mistaken(rank: int, ranks: int) -> Any:
    return _failing(rank, ranks, {0: MisconfigurationException("outputs must have a name")})


def both_fail(rank: int, ranks: int) -> Any:
    return _failing(rank, ranks, {0: RuntimeError("first"), 1: NotImplementedError("second")})


def a_sum_that_is_not_finite(rank: int, ranks: int) -> Any:
    """NaN among the numbers is no failure."""
    part = {"a": torch.tensor([torch.nan, 1.0])}
    return together(trainer(rank, ranks), lambda: part, {"a": torch.zeros(2)}, "adding")["a"]


def means(rank: int, ranks: int) -> dict[str, float]:
    """One name is left out by one rank."""
    values = {"x": torch.tensor(1.0 + rank)} | ({"y": torch.tensor(3)} if rank == 0 else {})
    return means_together(trainer(rank, ranks), lambda: values, ("y", "x"), "averaging")


def causes(rank: int, ranks: int) -> list[str]:
    """Of a product that is not finite: because rank 0 failed; because the loss is so."""
    error = ArithmeticError("a product must be finite")
    found = [cause_together(trainer(rank, ranks), RuntimeError("here") if rank == 0 else None, error)]
    found.append(cause_together(trainer(rank, ranks), None, error))
    return [f"{type(one).__name__}: {one}" for one in found]


def capacities(rank: int, ranks: int) -> Any:
    """Each rank is better at something."""
    own = {"vectors": 3.0 + rank, "route": 1.0 - rank}
    prepared = prepare_together(trainer(rank, ranks), lambda: Prepared("inputs", Any, own), ("vectors", "route"))  # type: ignore[arg-type]
    return prepared.problem, dict(prepared.capacities)


def preparing_fails(rank: int, ranks: int) -> str:
    """On rank 1 alone; none waits, and none measures."""

    def prepare() -> Prepared[str]:
        if rank == 1:
            raise RuntimeError("out of memory")
        return Prepared("inputs", Any, {"vectors": 1.0})  # type: ignore[arg-type]

    with pytest.raises(RuntimeError) as caught:
        prepare_together(trainer(rank, ranks), prepare, ("vectors",))
    return str(caught.value)


def goes_on(rank: int, ranks: int) -> int:
    """After all of this both processes are at the same collective."""
    total = torch.tensor(rank + 1)
    dist.all_reduce(total)
    return int(total)


class Shifted(IterableDataset[int]):
    """Gives other samples on each rank, and in each epoch."""

    def __init__(self, rank: int, epoch: int) -> None:
        self.rank, self.epoch = rank, epoch

    def __iter__(self) -> Iterator[int]:
        return iter(range(100 * self.rank + 10 * self.epoch, 1000))


def positions(rank: int, ranks: int) -> Any:
    """What is kept at a first reading and read at a second, in another epoch; the collectives of each."""
    bookmark, found, counts = Bookmark(), [], []
    for epoch in (1, 4):
        loader = DataLoader(Shifted(rank, epoch), batch_size=2)
        with (
            mock.patch.object(dist, "all_reduce", side_effect=dist.all_reduce) as reduce,
            mock.patch.object(dist, "all_gather_object", side_effect=dist.all_gather_object) as gather,
        ):
            probe = read_probe_set(trainer(rank, ranks), loader, samples=8, bookmark=bookmark)
        found.append([number for one in probe.batches for number in one.batch.tolist()])
        counts.append((reduce.call_count, gather.call_count))
    return bookmark.positions, found, counts


JOBS = (
    "positions",
    "sums",
    "one_fails",
    "one_is_mistaken",
    "both_fail",
    "a_sum_that_is_not_finite",
    "means",
    "causes",
    "capacities",
    "preparing_fails",
    "goes_on",
)
