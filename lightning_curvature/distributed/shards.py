"""Sharded parameters: the part of a tensor that this rank holds, and how FSDP2 gathers the whole."""

import contextlib
from collections.abc import Generator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard


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


def units(module: nn.Module) -> list[FSDPModule]:
    """Return the modules that FSDP2 gathers, each as one."""
    return [m for m in module.modules() if isinstance(m, FSDPModule)]


def is_of_sharding(hook: Any) -> bool:
    """Return whether a hook of a unit is one of FSDP2's."""
    owner, inner = getattr(hook, "__self__", None), getattr(hook, "__wrapped__", None)
    return type(owner).__module__.startswith("torch.distributed.fsdp") or (inner is not None and is_of_sharding(inner))


def groups_of(state: Any) -> list[Any]:
    """Return the groups of parameters that a unit, by its state, gathers at once. The names are private to torch."""
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    group = getattr(state, "_fsdp_param_group", None)
    return [] if group is None else [group]


def groups(module: nn.Module) -> list[Any]:
    """Return the groups of parameters of all units."""
    return [group for unit in units(module) for group in groups_of(unit._get_fsdp_state())]


@contextlib.contextmanager
def fresh_shards(module: nn.Module) -> Generator[None, None, None]:
    """Make FSDP2 gather the parameters anew inside and after the block, which only runs forwards.

    After a forward that no backward follows, FSDP2 keeps the gathered parameters of its root for the next one; written
    local shards would go unseen. After a forward that an error ended, it takes the next one for a part of it.
    """
    sharded = units(module)
    _reshard(sharded)
    try:
        yield
    except BaseException:
        _reset(sharded)
        raise
    finally:
        _reshard(sharded)
        _forget_forwards(sharded)


def _reshard(sharded: Sequence[FSDPModule]) -> None:
    for unit in sharded:
        unit.reshard()


def _forget_forwards(sharded: Sequence[FSDPModule]) -> None:
    """Drop the order of the forwards, in which the next backward would gather a unit that it has no use for.

    The names are private to torch: where they are others, that one gathering is all it costs.
    """
    for unit in sharded:
        state = unit._get_fsdp_state()
        order = getattr(getattr(state, "_comm_ctx", None), "post_forward_order", None)
        if order:
            for group in order:
                group._post_forward_indices.clear()
            order.clear()


def _reset(sharded: Sequence[FSDPModule]) -> None:
    """Bring FSDP2 back from a forward that an error ended (newer versions of torch have the means)."""
    for unit in sharded:
        if hasattr(unit, "reset_iter_state") and unit._get_fsdp_state()._is_root:
            assert isinstance(unit, nn.Module)
            gradients = [(p, p.grad) for p in unit.parameters()]
            unit.reset_iter_state()
            for p, gradient in gradients:
                p.grad = gradient  # it drops them; other callbacks may still look
