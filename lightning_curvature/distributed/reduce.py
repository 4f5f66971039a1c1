"""What is summed over which ranks: data-parallel losses, sharded vectors.

Every number of a measurement is brought to one form, in which its value over the whole job is the *mean over all
ranks*: a data-parallel loss is that already, a replicated dot product too, and a sharded one is after multiplication
with the number of shards. One all-reduce then serves all the numbers of a measurement.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    import lightning.pytorch as pl


def has_group() -> bool:
    """Whether processes are joined in a group of torch's."""
    return dist.is_available() and dist.is_initialized()


def sum_in_group(values: Tensor) -> Tensor:
    """Sum of a tensor over the processes of the group, one all-reduce.

    Not the strategy's own, which puts a barrier before each reduction: a second wait for the slowest rank.
    """
    total = values.clone()
    dist.all_reduce(total)
    return total


def mean_over_ranks(trainer: "pl.Trainer", values: Tensor) -> Tensor:
    """Mean of a tensor over all ranks, one all-reduce; the tensor itself on one process."""
    if trainer.world_size == 1:
        return values
    if not has_group():
        return trainer.strategy.reduce(values.clone(), reduce_op="mean")  # type: ignore[return-value]
    return sum_in_group(values) / trainer.world_size


def mean_of_scalars(trainer: "pl.Trainer", values: Mapping[str, Tensor], device: torch.device) -> dict[str, float]:
    """Mean over the ranks of several scalars: one collective, one synchronization."""
    names = sorted(values)
    packed = torch.stack([values[name].detach().to(device, torch.float64).reshape(()) for name in names])
    return dict(zip(names, mean_over_ranks(trainer, packed).tolist(), strict=True))


def least_over_ranks(trainer: "pl.Trainer", value: float) -> float:
    """The least of a number over all ranks, one collective."""
    if trainer.world_size == 1:
        return value
    least = torch.tensor(value, dtype=torch.float64, device=trainer.strategy.root_device)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return float(least)


def sum_over_ranks(trainer: "pl.Trainer") -> Callable[[Tensor], Tensor] | None:
    """Sum of a tensor over all ranks, one all-reduce; None on one process."""
    if trainer.world_size == 1:
        return None
    if not has_group():
        return lambda values: mean_over_ranks(trainer, values) * trainer.world_size
    return sum_in_group


def sum_of_tensors(trainer: "pl.Trainer", values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sums over the ranks of several tensors, alike on all of them: one collective; the tensors on one process."""
    reduce = sum_over_ranks(trainer)
    if reduce is None:
        return dict(values)
    names = sorted(values)
    packed = reduce(torch.cat([values[name].flatten() for name in names]))
    parts = packed.split([values[name].numel() for name in names])
    return {name: part.view_as(values[name]) for name, part in zip(names, parts, strict=True)}
