"""Runs with parameters in shards (FSDP2)."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from lightning_curvature import BatchSharpnessMonitor, DirectionalCurvatureMonitor, HessianSpectrumMonitor
from lightning_curvature.distributed.shards import fresh_shards
from tests.distributed.cases import Case, adamw, batches, beyond_the_edge, momentum, one_batch
from tests.helpers.runs import Batch, Classifier, MakeOptimizer, loader, make_trainer, mlp

FORWARD_ONLY = ("kl", "finite_difference", "critical")
strategy = partial(ModelParallelStrategy, data_parallel_size=2, tensor_parallel_size=1)


class Sharded(Classifier):
    """Each linear layer is a unit of its own, gathered for its forward."""

    def configure_model(self) -> None:
        if self._device_mesh is None or any(isinstance(p, DTensor) for p in self.parameters()):
            return
        mesh = self._device_mesh["data_parallel"]
        for layer in self.network:
            if list(layer.parameters()):
                fully_shard(layer, mesh=mesh)
        fully_shard(self.network, mesh=mesh)


class ShardedAsOne(Classifier):
    """One unit, the root: FSDP2 leaves it gathered after a forward that no backward follows."""

    def configure_model(self) -> None:
        if self._device_mesh is not None and not isinstance(self.network[0].weight, DTensor):
            fully_shard(self.network, mesh=self._device_mesh["data_parallel"])


def classifier(make_optimizer: MakeOptimizer = momentum, *hidden: int, kind: Any = Sharded) -> Any:
    # Three outputs over two processes: the shards of the last layer differ in size.
    return kind(mlp(4, *(hidden or (6,)), 3), make_optimizer)


def kinked() -> Sharded:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 12), nn.Hardtanh(), nn.Linear(12, 3)]
    return Sharded(nn.Sequential(*layers).double(), momentum)


def regressor() -> Sharded:
    """One output: its bias is a single number, so that one of the processes holds nothing of it."""
    return Sharded(mlp(4, 6, 1), momentum, F.mse_loss)


def regression() -> list[Batch]:
    return [(x, x.square().sum(-1, keepdim=True).sin()) for x, _ in batches()]


def case(module: Any, trainer: dict[str, Any] | None = None, **options: Any) -> Case:
    # The strategy refuses "64-true", but leaves a float64 module as it is under "32-true".
    trainer = {"precision": "32-true"} | (trainer or {})
    return Case(module, trainer=trainer, **({"strategy": strategy, "estimators": FORWARD_ONLY} | options))


def focal(z: Tensor, y: Tensor) -> Tensor:
    """No likelihood of its outputs."""
    log_p = z.log_softmax(-1).gather(1, y[:, None])
    return (-((1.0 - log_p.exp()) ** 2) * log_p).mean()


def focused(*hidden: int, kind: Any = Sharded) -> Any:
    return kind(mlp(4, *(hidden or (6,)), 3), momentum, focal)


class Penalized(Sharded):
    """Has a loss that depends on a parameter in shards, past the outputs."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        weight = self.network[0].weight
        whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
        return super().training_step(batch, batch_idx) + 0.01 * whole.square().sum()


sgd = case(partial(classifier, momentum))
adam = case(partial(classifier, adamw))
flipping = case(partial(classifier, beyond_the_edge), batches=one_batch, estimators=("oscillation", "kl"))
flipping_unwatched = flipping.unwatched()
as_one = case(partial(classifier, momentum, kind=ShardedAsOne))
squared_error = case(regressor, batches=regression)
one_sided = case(classifier, estimators=("kl",))
on_sides = case(kinked)
headed = case(focused)
headed_as_one = case(partial(focused, kind=ShardedAsOne))
headed_one_sided = case(focused, estimators=("kl",))
headed_accumulated = case(
    focused, batches=partial(batches, 5), trainer={"accumulate_grad_batches": 2}, estimators=("kl", "finite_difference")
)
accumulated = case(classifier, batches=partial(batches, 5), trainer={"accumulate_grad_batches": 2})


def noisy() -> Sharded:
    """Everything that a repeated forward could disturb: batch statistics, random numbers, averages."""
    torch.manual_seed(0)
    layers = [nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3)]
    return Sharded(nn.Sequential(*layers).double(), adamw)


disturbed = case(noisy)
undisturbed = disturbed.unwatched()
sgd_unwatched = sgd.unwatched()
as_one_unwatched = as_one.unwatched()

seldom = case(classifier, estimators=("kl", "finite_difference"), monitor={"every_n_train_steps": 2})
seldom_deep = replace(seldom, module=partial(classifier, momentum, 6, 6, 6))
seldom_unwatched = seldom.unwatched()
seldom_deep_unwatched = seldom_deep.unwatched()

headed_unwatched = headed.unwatched()
headed_seldom = case(focused, estimators=("kl", "finite_difference"), monitor={"every_n_train_steps": 2})
headed_seldom_deep = replace(headed_seldom, module=partial(focused, 6, 6, 6))
headed_seldom_unwatched, headed_seldom_deep_unwatched = headed_seldom.unwatched(), headed_seldom_deep.unwatched()
penalized = case(partial(focused, kind=Penalized), estimators=("kl", "finite_difference"))
penalized_unwatched = penalized.unwatched()

JOBS = [name for name, value in list(globals().items()) if isinstance(value, Case)]


def interrupted(rank: int, world_size: int) -> dict[str, bool]:
    """State of FSDP2 after an evaluation failed between two layers."""

    def fail(layer: nn.Module, inputs: Any) -> None:
        raise RuntimeError

    network = mlp(4, 6, 3)
    for unit in (network[0], network[2], network):
        fully_shard(unit, mesh=init_device_mesh("cpu", (world_size,)))
    x, _ = batches(1)[0]
    network(x).sum().backward()
    network[1].register_forward_pre_hook(fail)
    with contextlib.suppress(RuntimeError), fresh_shards(network), torch.no_grad():
        network(x)
    return {
        "within a forward": network._get_fsdp_state()._state_ctx.iter_forward_root is not None,
        "in shards": all(isinstance(p, DTensor) for p in network.parameters()),
        "with gradients": all(p.grad is not None for p in network.parameters()),
    }


class ByColumns(Classifier):
    """Cuts a layer by its columns, over the ranks of whichever dimension of the mesh has some."""

    def configure_model(self) -> None:
        meshes = [self._device_mesh[name] for name in ("data_parallel", "tensor_parallel")]
        if not isinstance(self.network[0].weight, DTensor):
            parallelize_module(self.network[0], max(meshes, key=lambda mesh: mesh.size()), ColwiseParallel())


def tensor_parallel(rank: int, world_size: int) -> list[str]:
    """What is said of tensor parallelism that the strategy knows of, and of such that it does not."""
    said = []
    for sizes in ({"data_parallel_size": 1, "tensor_parallel_size": 2}, {}):
        for follow in (DirectionalCurvatureMonitor(), HessianSpectrumMonitor(), BatchSharpnessMonitor()):
            trainer = make_trainer(
                follow, devices=2, precision="32-true", strategy=strategy(**sizes), use_distributed_sampler=False
            )
            try:
                trainer.fit(classifier(kind=ByColumns), loader(batches()))
            except MisconfigurationException as error:
                said.append(str(error))
    return said


def refusal(rank: int, world_size: int) -> str:
    """What is said where derivatives of sharded parameters are asked for."""
    try:
        case(classifier, estimators=("kl", "hvp", "gauss_newton"))(rank, world_size)
    except MisconfigurationException as error:
        return str(error)
    return ""
