"""Modules, optimizers and data that monitors refuse, or must not stumble over."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils.data import DataLoader

from tests.helpers.runs import Batch, Classifier, mlp


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.1)


def sharded(module: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a module whose last layer has become a shard, by other means than FSDP2's."""
    network: Any = module.get_submodule("network")
    mesh = init_device_mesh("cpu", (1,))
    network[2].weight = nn.Parameter(distribute_tensor(network[2].weight.detach(), mesh, [Shard(0)]))
    return sgd(module)


def stand_in(name: str, base: type) -> Any:
    """A class that calls itself one of another package."""
    place, _, own = name.rpartition(".")
    return type(own, (base,), {"__module__": place})


class Plain(Classifier):
    """A classifier that counts its steps."""

    def __init__(
        self, network: nn.Module | None = None, make_optimizer: Any = sgd, loss: Any = F.cross_entropy
    ) -> None:
        super().__init__(network or mlp(4, 6, 3), make_optimizer, loss)
        self.seen = torch.zeros((), dtype=torch.long)

    def on_train_batch_end(self, *args: Any) -> None:
        self.seen += 1


class TwoOptimizers(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [sgd(self.network[0]), sgd(self.network[2])]

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        pass


class NoOptimizer(Plain):
    def configure_optimizers(self) -> None:
        return None


class FromIterator(Plain):
    def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
        batch, _, _ = next(dataloader_iter)
        return self.loss(self(batch[0]), batch[1])


def unending() -> Any:
    from tests.helpers.traps import Stream

    return DataLoader(Stream(), batch_size=8)
