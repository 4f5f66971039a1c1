"""What may change while a run goes on: names of parameters, which of them train, optimizers, sizes of batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import BaseFinetuning, GradientAccumulationScheduler, ModelPruning
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.utils.data import DataLoader

from tests.helpers.modules import Plain
from tests.helpers.runs import batched_samples, mlp

# Two steps an epoch; what changes at a step does so at the end of the epoch before, with the optimizer's state.
AT, STEPS = 2, 6


def momentum(module: nn.Module) -> torch.optim.Optimizer:
    trained = [p for p in module.parameters() if p.requires_grad]
    return torch.optim.SGD(trained, lr=0.1, momentum=0.5)


class Changing(Plain):
    """Two steps an epoch of batches of a size for each epoch; the layers named before may start frozen."""

    def __init__(self, sizes: tuple[int, ...] = (8, 8, 8), frozen: tuple[int, ...] = ()) -> None:
        super().__init__(mlp(4, 6, 3), momentum)
        self.sizes = sizes
        for layer in frozen:
            self.network.get_submodule(str(layer)).requires_grad_(False)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(batched_samples().dataset, batch_size=self.sizes[self.trainer.current_epoch])


class At(pl.Callback):
    """Does something once, before a step."""

    def __init__(self, step: int, change: Callable[[pl.Trainer, Any], None]) -> None:
        self.step, self.change, self.is_done = step, change, False

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step and not self.is_done:
            self.is_done = True
            self.change(trainer, pl_module.network)


class Late(pl.Callback):
    """A monitor that comes into the run at a step, as if the fit began there."""

    def __init__(self, monitor: pl.Callback, step: int = AT) -> None:
        self.monitor, self.step, self.is_there = monitor, step, False

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        def forward(hook: str) -> Callable[..., None]:
            def call(trainer: Any, pl_module: Any, *args: Any) -> None:
                if hook == "on_train_batch_start" and trainer.global_step >= self.step and not self.is_there:
                    self.is_there = True
                    self.monitor.setup(trainer, pl_module, "fit")
                    self.monitor.on_fit_start(trainer, pl_module)
                if self.is_there:
                    getattr(self.monitor, hook)(trainer, pl_module, *args)

            return call

        for hook in ("on_train_batch_start", "on_after_backward", "on_before_optimizer_step", "on_train_batch_end"):
            setattr(self, hook, forward(hook))

    # Lightning asks the class which hooks there are.
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self.is_there:
            self.monitor.on_train_epoch_end(trainer, pl_module)


class Shrunk(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 0.9 * weight

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight / 0.9


class Thaw(BaseFinetuning):
    """Trains the last layer in the first epoch, and both after it, in two groups."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.network[0])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.network[0], optimizer, lr=0.05)


def replace(trainer: pl.Trainer, network: Any) -> None:
    """Train all layers from now on, by another optimizer."""
    network.requires_grad_(True)
    trainer.optimizers = [torch.optim.Adam(network.parameters(), lr=0.02)]


@dataclass(frozen=True)
class Change:
    """A run of three epochs of two steps each.

    Attributes:
        callbacks: which make the change.
        make: the module.
        options: of the Trainer.
        parameter: the block of which noise can be measured all along.
        steps: those of the run.
    """

    callbacks: Callable[[], list[pl.Callback]] = list
    make: Callable[[], Any] = Changing
    options: dict[str, Any] = field(default_factory=dict)
    parameter: str = "network.0.weight"
    steps: tuple[int, ...] = tuple(range(STEPS))


def once(*changes: tuple[int, Callable[[pl.Trainer, Any], None]]) -> Change:
    return Change(lambda: [At(*change) for change in changes])


def pruned(trainer: pl.Trainer, network: Any) -> None:
    prune.l1_unstructured(network[0], "weight", 0.4)


CHANGES: dict[str, Change] = {
    "pruned": once((AT, pruned)),
    "pruned, made permanent": once((AT, pruned), (AT + 2, lambda _, network: prune.remove(network[0], "weight"))),
    "ModelPruning": Change(lambda: [ModelPruning("l1_unstructured", amount=0.3)]),
    "parametrized, then no more": once(
        (AT, lambda _, network: parametrize.register_parametrization(network[0], "weight", Shrunk())),
        (AT + 2, lambda _, network: parametrize.remove_parametrizations(network[0], "weight", False)),
    ),
    "frozen": Change(
        lambda: [At(AT, lambda _, network: network[0].requires_grad_(False))], parameter="network.2.weight"
    ),
    "unfrozen, with a group": Change(lambda: [Thaw()], parameter="network.2.weight"),
    "another optimizer of more parameters": Change(
        lambda: [At(AT, replace)], lambda: Changing(frozen=(0,)), parameter="network.2.weight"
    ),
    "accumulation": Change(lambda: [GradientAccumulationScheduler({0: 1, 1: 2})], steps=(0, 1, 2, 3)),
    "size of batches": Change(
        make=lambda: Changing((8, 4, 8)), options={"reload_dataloaders_every_n_epochs": 1}, steps=tuple(range(8))
    ),
}
