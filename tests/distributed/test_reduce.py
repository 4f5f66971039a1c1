"""Sums over ranks: none on one process, one all-reduce in a group, else by the strategy's mean."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_curvature.distributed.reduce import has_group, sum_over_ranks
from tests.helpers.processes import run_on_ranks


def summed(rank: int, ranks: int) -> Any:
    """The sum, and the tensor that was given."""
    reduce = sum_over_ranks(SimpleNamespace(world_size=ranks))  # type: ignore[arg-type]
    own = torch.tensor([1.0, 10.0]) * (rank + 1)
    before = dist.group.WORLD._get_sequence_number_for_group()
    assert reduce is not None
    total = reduce(own)
    return total.tolist(), own.tolist(), dist.group.WORLD._get_sequence_number_for_group() - before, has_group()


def test_one_process_sums_nothing() -> None:
    assert not has_group()
    assert sum_over_ranks(SimpleNamespace(world_size=1)) is None  # type: ignore[arg-type]


def test_two_ranks_have_the_sum_by_one_collective() -> None:
    first, second = run_on_ranks(__name__, ["summed"])["summed"]
    assert first == ([3.0, 30.0], [1.0, 10.0], 1, True)
    assert second == ([3.0, 30.0], [2.0, 20.0], 1, True)


def test_a_strategy_without_a_group_gives_its_mean_times_the_ranks() -> None:
    def reduce(values: Tensor, reduce_op: str) -> Tensor:
        assert reduce_op == "mean"
        return values.mul_(2.5)  # as if the others had more; in place, as some do

    trainer: Any = SimpleNamespace(world_size=4, strategy=SimpleNamespace(reduce=reduce))
    own, sums = torch.ones(2), sum_over_ranks(trainer)
    assert sums is not None
    assert sums(own).tolist() == [10.0, 10.0]
    assert own.tolist() == [1.0, 1.0]
