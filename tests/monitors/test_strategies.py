"""Trainers and strategies under which a monitor would be wrong are refused by one sentence, at setup."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.single_xla import SingleDeviceXLAStrategy
from lightning.pytorch.strategies.xla import XLAStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_curvature import BatchSharpnessMonitor, DirectionalCurvatureMonitor, HessianSpectrumMonitor
from lightning_curvature.monitors.strategies import check_strategy
from tests.helpers.runs import Classifier, classification, loader, make_trainer, mlp


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.1)


MONITORS = {cls.__name__: cls for cls in (DirectionalCurvatureMonitor, HessianSpectrumMonitor, BatchSharpnessMonitor)}


def bare(kind: Any) -> Any:
    """A strategy whose package is not installed: its constructor would say so."""
    return object.__new__(kind)


class SharedBatches(DDPStrategy):
    """Two of four ranks get the same batches, as under tensor parallelism."""

    distributed_sampler_kwargs = {"num_replicas": 2, "rank": 0}  # noqa: RUF012


OTHERS = "train with strategy='ddp', or with ModelParallelStrategy and fully_shard in configure_model (FSDP2)"
# Strategy, what is said of it before the remedy, the remedy.
REFUSED: dict[str, tuple[Callable[[], Any], str, str | None]] = {
    "FSDP1": (
        FSDPStrategy,
        "strategy must leave each parameter a tensor by itself for {}, got FSDPStrategy, which flattens several into "
        "one (FSDP1): ",
        None,
    ),
    "DeepSpeed": (
        lambda: bare(DeepSpeedStrategy),
        "strategy must leave gradients on the parameters and steps to the optimizer for {}, got DeepSpeedStrategy, "
        "whose engine keeps both to itself: ",
        None,
    ),
    **{
        kind.__name__: (
            lambda kind=kind: bare(kind),
            f"strategy must run steps as they are called for {{}}, got {kind.__name__}, which compiles them for "
            "later: ",
            "train on a GPU or on CPUs, or leave the monitor out",
        )
        for kind in (XLAStrategy, SingleDeviceXLAStrategy)
    },
    "shared batches": (
        SharedBatches,
        "strategy must give each rank batches of its own for {}, got SharedBatches, whose 4 ranks share those of 2 "
        "(tensor parallelism): ",
        "set tensor_parallel_size=1, or leave the monitor out",
    ),
}


@pytest.mark.parametrize("monitor", MONITORS)
@pytest.mark.parametrize("name", REFUSED)
def test_strategies_are_refused_at_setup(name: str, monitor: str) -> None:
    make, sentence, remedy = REFUSED[name]
    trainer: Any = SimpleNamespace(strategy=make(), callbacks=[], world_size=4)
    follow = MONITORS[monitor](on_error="warn")  # a strategy lasts as long as the run
    with pytest.raises(MisconfigurationException) as caught:
        follow.setup(trainer, Classifier(mlp(4, 3), sgd), "fit")
    assert str(caught.value) == f"{sentence.format(monitor)}{remedy or OTHERS}."
    # Nothing is measured elsewhere.
    follow.setup(trainer, Classifier(mlp(4, 3), sgd), "validate")


class TwinTrainer:
    strategy = SingleDeviceStrategy()
    callbacks = ()
    world_size = 1


TwinTrainer.__module__ = "pytorch_lightning.trainer.trainer"


class OwnTrainer(TwinTrainer):
    """A user's."""


@pytest.mark.parametrize("monitor", MONITORS)
@pytest.mark.parametrize("kind", [TwinTrainer, OwnTrainer])
def test_the_twin_package_is_refused_at_setup(kind: Any, monitor: str) -> None:
    expected = (
        f"trainer must be one of lightning.pytorch for {monitor}, got pytorch_lightning.trainer.trainer.TwinTrainer: "
        "import Trainer and LightningModule from lightning.pytorch."
    )
    with pytest.raises(MisconfigurationException, match=f"^{re.escape(expected)}$"):
        MONITORS[monitor]().setup(kind(), Classifier(mlp(4, 3), sgd), "fit")


def test_a_subclass_of_the_trainer_is_welcome() -> None:
    class Own(type(make_trainer())):  # type: ignore[misc]
        pass

    Own.__module__ = "pytorch_lightning_extras"
    trainer = make_trainer(*(cls(prefix=name) for name, cls in MONITORS.items()), max_steps=1)
    trainer.__class__ = Own
    trainer.fit(Classifier(mlp(4, 5, 3), sgd), loader(classification(1)))
    assert trainer.global_step == 1


@pytest.fixture
def four_ranks() -> Iterator[None]:
    """A group of four, of which only this process exists."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        yield
    finally:
        dist.destroy_process_group()


def sharded(network: nn.Module, mesh: DeviceMesh) -> nn.Module:
    fully_shard(network, mesh=mesh)
    return network


def by_columns(mesh: DeviceMesh) -> nn.Module:
    network = mlp(4, 4, 4)
    parallelize_module(network[0], mesh["tp"], ColwiseParallel())
    return network


def grid(first: str, second: str) -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=(first, second))


CUT: dict[str, tuple[Callable[[], nn.Module], str | None]] = {
    "FSDP2": (lambda: sharded(mlp(4, 4, 4), init_device_mesh("cpu", (4,))), None),
    "copies of shards": (lambda: sharded(mlp(4, 4, 4), grid("copies", "shards")), None),
    "tensor parallelism": (lambda: by_columns(grid("dp", "tp")), "0.weight"),
    "both": (lambda: sharded(by_columns(mesh := grid("dp", "tp")), mesh["dp"]), "0.weight"),
}


@pytest.mark.usefixtures("four_ranks")
@pytest.mark.parametrize("name", CUT)
def test_parameters_cut_by_other_means_than_fsdp2_are_refused(name: str) -> None:
    make, culprit = CUT[name]
    trainer: Any = SimpleNamespace(strategy=SingleDeviceStrategy(), world_size=4)
    if culprit is None:
        check_strategy(trainer, make(), "Monitor")
        return
    expected = (
        f"parameters must be whole, or sharded by FSDP2's fully_shard alone, for Monitor, got {culprit!r} as a DTensor "
        "of another kind (tensor parallelism): leave its parallelization or the monitor out."
    )
    with pytest.raises(MisconfigurationException, match=f"^{re.escape(expected)}$"):
        check_strategy(trainer, make(), "Monitor")
