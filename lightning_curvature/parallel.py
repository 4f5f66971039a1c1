"""What is summed over which ranks: data-parallel losses, sharded vectors.

Every number of a measurement is brought to one form, in which its value over the whole job is the *mean over all
ranks*: a data-parallel loss is that already, a replicated dot product too, and a sharded one is after multiplication
with the number of shards. One all-reduce then serves all the numbers of a measurement.
"""

import contextlib
from collections.abc import Generator, Sequence

import lightning.pytorch as pl
from torch import Tensor, nn
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


def mean_over_ranks(trainer: pl.Trainer, values: Tensor) -> Tensor:
    """Mean of a tensor over all ranks, one all-reduce; the tensor itself on one process."""
    if trainer.world_size == 1:
        return values
    return trainer.strategy.reduce(values.clone(), reduce_op="mean")  # type: ignore[return-value]


@contextlib.contextmanager
def fresh_shards(module: nn.Module) -> Generator[None, None, None]:
    """Make FSDP2 gather the parameters anew inside and after the block.

    After a forward that no backward follows, FSDP2 keeps the gathered parameters of its root for the next one; written
    local shards would go unseen.
    """
    _reshard(module)
    try:
        yield
    finally:
        _reshard(module)


def _reshard(module: nn.Module) -> None:
    from torch.distributed.fsdp import FSDPModule

    for submodule in module.modules():
        if isinstance(submodule, FSDPModule):
            submodule.reshard()
