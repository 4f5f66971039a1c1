"""What is summed over which ranks: data-parallel losses, sharded vectors.

Every number of a measurement is brought to one form, in which its value over the whole job is the *mean over all
ranks*: a data-parallel loss is that already, a replicated dot product too, and a sharded one is after multiplication
with the number of shards. One all-reduce then serves all the numbers of a measurement.
"""

import contextlib
import functools
from collections.abc import Callable, Generator, Mapping, Sequence

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from lightning_curvature.linalg import VectorSpace


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor: the shard of a DTensor (sharing its memory), else the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_count(tensor: Tensor) -> int:
    """Return into how many distinct parts a tensor is cut over the ranks (1 unless it is a sharded DTensor)."""
    if not isinstance(tensor, DTensor):
        return 1
    sizes = tensor.device_mesh.shape
    count = 1
    for size, placement in zip(sizes, tensor.placements, strict=True):
        if isinstance(placement, Shard):
            count *= size
    return count


def is_sharded(parameters: Sequence[Tensor]) -> bool:
    """Whether any parameter is a DTensor."""
    return any(isinstance(p, DTensor) for p in parameters)


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


def mean_over_ranks(trainer: pl.Trainer, values: Tensor) -> Tensor:
    """Mean of a tensor over all ranks, one all-reduce; the tensor itself on one process."""
    if trainer.world_size == 1:
        return values
    if not has_group():
        return trainer.strategy.reduce(values.clone(), reduce_op="mean")  # type: ignore[return-value]
    return sum_in_group(values) / trainer.world_size


def mean_of_scalars(trainer: pl.Trainer, values: Mapping[str, Tensor], device: torch.device) -> dict[str, float]:
    """Mean over the ranks of several scalars: one collective, one synchronization."""
    names = sorted(values)
    packed = torch.stack([values[name].detach().to(device, torch.float64).reshape(()) for name in names])
    return dict(zip(names, mean_over_ranks(trainer, packed).tolist(), strict=True))


def least_over_ranks(trainer: pl.Trainer, value: float) -> float:
    """The least of a number over all ranks, one collective."""
    if trainer.world_size == 1:
        return value
    least = torch.tensor(value, dtype=torch.float64, device=trainer.strategy.root_device)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return float(least)


def sum_over_ranks(trainer: pl.Trainer) -> Callable[[Tensor], Tensor] | None:
    """Sum of a tensor over all ranks, one all-reduce; None on one process."""
    if trainer.world_size == 1:
        return None
    if not has_group():
        return lambda values: mean_over_ranks(trainer, values) * trainer.world_size
    return sum_in_group


def sum_of_tensors(trainer: pl.Trainer, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sums over the ranks of several tensors, alike on all of them: one collective; the tensors on one process."""
    reduce = sum_over_ranks(trainer)
    if reduce is None:
        return dict(values)
    names = sorted(values)
    packed = reduce(torch.cat([values[name].flatten() for name in names]))
    parts = packed.split([values[name].numel() for name in names])
    return {name: part.view_as(values[name]) for name, part in zip(names, parts, strict=True)}


def vector_space(trainer: pl.Trainer, parameters: Sequence[Tensor]) -> VectorSpace:
    """The space of the parameters, of which ranks may hold parts."""
    if not is_sharded(parameters):
        return VectorSpace(parameters)
    return VectorSpace(
        [local(p) for p in parameters],
        reduce=sum_over_ranks(trainer),
        shares=[shard_count(p) / trainer.world_size for p in parameters],
        shapes=[p.shape for p in parameters],
        cut=[functools.partial(own_part, like=p) for p in parameters],
    )


def own_part(full: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a tensor that is cut as ``like`` is."""
    if not isinstance(like, DTensor):
        return full
    mesh = like.device_mesh
    for dimension, placement in enumerate(like.placements):
        if isinstance(placement, Shard):
            chunks = full.chunk(mesh.size(dimension), placement.dim)
            rank = mesh.get_local_rank(dimension)
            # torch cuts like chunk: the last ranks may be left with nothing.
            full = chunks[rank] if rank < len(chunks) else full.narrow(placement.dim, 0, 0)
    return full


@contextlib.contextmanager
def fresh_shards(module: nn.Module) -> Generator[None, None, None]:
    """Make FSDP2 gather the parameters anew inside and after the block, which only runs forwards.

    After a forward that no backward follows, FSDP2 keeps the gathered parameters of its root for the next one; written
    local shards would go unseen. After a forward that an error ended, it takes the next one for a part of it.
    """
    units = [m for m in module.modules() if isinstance(m, FSDPModule)]
    _reshard(units)
    try:
        yield
    except BaseException:
        _reset(units)
        raise
    finally:
        _reshard(units)
        _forget_forwards(units)


def _reshard(units: Sequence[FSDPModule]) -> None:
    for unit in units:
        unit.reshard()


def _forget_forwards(units: Sequence[FSDPModule]) -> None:
    """Drop the order of the forwards, in which the next backward would gather a unit that it has no use for.

    The names are private to torch: where they are others, that one gathering is all it costs.
    """
    for unit in units:
        state = unit._get_fsdp_state()
        order = getattr(getattr(state, "_comm_ctx", None), "post_forward_order", None)
        if order:
            for group in order:
                group._post_forward_indices.clear()
            order.clear()


def _reset(units: Sequence[FSDPModule]) -> None:
    """Bring FSDP2 back from a forward that an error ended (newer versions of torch have the means)."""
    for unit in units:
        if hasattr(unit, "reset_iter_state") and unit._get_fsdp_state()._is_root:
            assert isinstance(unit, nn.Module)
            gradients = [(p, p.grad) for p in unit.parameters()]
            unit.reset_iter_state()
            for p, gradient in gradients:
                p.grad = gradient  # it drops them; other callbacks may still look
