"""Sums over data-parallel ranks.

Every number of a measurement is brought to one form, in which its value over the whole job is the *mean over all
ranks*: a data-parallel loss is that already, a replicated dot product too, and a sharded one is after multiplication
with the number of shards.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    import lightning.pytorch as pl


def has_group() -> bool:
    """Return whether torch's default process group exists."""
    return dist.is_available() and dist.is_initialized()


def sum_in_group(values: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Return the sum of a tensor over the processes of a group, the default one if None; one all-reduce.

    The strategy's own reduction puts a barrier before each: a second wait for the slowest rank.
    """
    total = values.clone()
    dist.all_reduce(total, group=group)
    return total


def sum_over_ranks(trainer: "pl.Trainer") -> Callable[[Tensor], Tensor] | None:
    """Return a function that sums a tensor over all ranks with one all-reduce; None on one process."""
    if trainer.world_size == 1:
        return None
    if not has_group():
        reduce, ranks = trainer.strategy.reduce, trainer.world_size
        return lambda values: reduce(values.clone(), reduce_op="mean") * ranks  # type: ignore[operator, return-value]
    return sum_in_group
