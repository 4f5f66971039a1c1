"""Which Trainers and strategies a monitor works under: one sentence for each of the others."""

from collections.abc import Iterator

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ParallelStrategy
from lightning.pytorch.strategies.single_xla import SingleDeviceXLAStrategy
from lightning.pytorch.strategies.xla import XLAStrategy
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def check_strategy(trainer: pl.Trainer, module: nn.Module, monitor: str) -> None:
    """Raise unless a monitor works under the Trainer's strategy; called in ``setup`` and when all is set up."""
    # The twin package's Trainer takes callbacks of lightning, but its classes are others.
    strange = [cls for cls in type(trainer).__mro__ if cls.__module__.partition(".")[0] == "pytorch_lightning"]
    if strange:
        raise MisconfigurationException(
            f"trainer must be one of lightning.pytorch for {monitor}, got {strange[0].__module__}."
            f"{strange[0].__qualname__}: import Trainer and LightningModule from lightning.pytorch."
        )
    strategy = trainer.strategy
    name = type(strategy).__name__
    remedy = "train with strategy='ddp', or with ModelParallelStrategy and fully_shard in configure_model (FSDP2)"
    if isinstance(strategy, FSDPStrategy):
        raise MisconfigurationException(
            f"strategy must leave each parameter a tensor by itself for {monitor}, got {name}, which flattens several "
            f"into one (FSDP1): {remedy}."
        )
    if isinstance(strategy, DeepSpeedStrategy):
        raise MisconfigurationException(
            f"strategy must leave gradients on the parameters and steps to the optimizer for {monitor}, got {name}, "
            f"whose engine keeps both to itself: {remedy}."
        )
    if isinstance(strategy, (XLAStrategy, SingleDeviceXLAStrategy)):
        raise MisconfigurationException(
            f"strategy must run steps as they are called for {monitor}, got {name}, which compiles them for later: "
            "train on a GPU or on CPUs, or leave the monitor out."
        )
    if isinstance(strategy, ParallelStrategy):
        replicas = strategy.distributed_sampler_kwargs.get("num_replicas", trainer.world_size)
        if replicas != trainer.world_size:
            raise MisconfigurationException(
                f"strategy must give each rank batches of its own for {monitor}, got {name}, whose "
                f"{trainer.world_size} ranks share those of {replicas} (tensor parallelism): set "
                "tensor_parallel_size=1, or leave the monitor out."
            )
    for parameter in _strangely_cut(module):
        raise MisconfigurationException(
            f"parameters must be whole, or sharded by FSDP2's fully_shard alone, for {monitor}, got {parameter!r} as a "
            "DTensor of another kind (tensor parallelism): leave its parallelization or the monitor out."
        )


def _strangely_cut(module: nn.Module) -> Iterator[str]:
    """Yield names of parameters that are cut, or held as DTensors, by other means than data parallelism."""
    units = [m for m in module.modules() if isinstance(m, FSDPModule)]
    sharded = {id(p) for unit in units for p in unit.parameters()}  # type: ignore[attr-defined]
    for name, p in module.named_parameters():
        if isinstance(p, DTensor) and (id(p) not in sharded or _is_cut_twice(p)):
            yield name


def _is_cut_twice(parameter: DTensor) -> bool:
    """Whether a parameter is cut along another dimension of the mesh than the last.

    FSDP2 alone cuts along the last one and repeats along those before; tensor parallelism puts its dimension last.
    """
    *before, _ = zip(parameter.device_mesh.shape, parameter.placements, strict=True)
    return any(size > 1 and not placement.is_replicate() for size, placement in before)
