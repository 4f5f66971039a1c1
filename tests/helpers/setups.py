"""Runs of every common kind, each of which a monitor must leave bit for bit as it is."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
import torchmetrics
from lightning.pytorch.callbacks import EarlyStopping, StochasticWeightAveraging
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers.modules import sgd
from tests.helpers.runs import Batch, Classifier, classification, mlp
from tests.helpers.witness import Record, copies, watch


def regular(network: Callable[[], nn.Module]) -> Callable[[], pl.LightningModule]:
    return lambda: Classifier(network(), sgd)


def optimized(make: Callable[[Any], Any]) -> Callable[[], pl.LightningModule]:
    return lambda: Classifier(mlp(4, 6, 3), lambda m: make(m.parameters()))


def with_dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.4), nn.Linear(8, 3)).double()


def with_batchnorm() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double()


def with_frozen_layer() -> nn.Module:
    network = mlp(4, 6, 6, 3)
    network[0].requires_grad_(False)
    return network


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).tanh()).tanh())


def two_groups(module: Any) -> torch.optim.Optimizer:
    groups = [{"params": module.network[0].parameters(), "lr": 0.05}, {"params": module.network[2].parameters()}]
    return torch.optim.SGD(groups, lr=0.2)


def scheduled(module: nn.Module) -> dict[str, Any]:
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": StepLR(optimizer, 2, 0.5), "interval": "step"}}


class Langevin(torch.optim.SGD):
    """Draws random numbers of its own, after the training step drew its."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.add_(1e-3 * torch.randn_like(p))
        return loss


class Manual(Classifier):
    """Manual optimization with accumulation, clipping and a scheduler stepped by hand."""

    def __init__(self) -> None:
        super().__init__(mlp(4, 6, 3), scheduled)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.manual_backward(loss)
        self.log("train_loss", loss)
        if batch_idx % 2 == 1:
            self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
            optimizer.step()
            optimizer.zero_grad()
            self.lr_schedulers().step()


class DictBatch(Classifier):
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        outputs = self(batch["input"][0])
        return {"loss": self.loss(outputs, batch["label"]), "outputs": outputs}


class Measured(Classifier):
    """With metrics in the module, a validation loop, dropout and BatchNorm."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(with_batchnorm(), nn.Dropout(0.1), nn.Linear(3, 3).double()), scheduled)
        self.accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=3)
        self.mean = torchmetrics.MeanMetric()
        self.every = torchmetrics.CatMetric()
        self.several = torchmetrics.MetricCollection([torchmetrics.MinMetric(), torchmetrics.MaxMetric()])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch[0])
        loss = F.cross_entropy(logits, batch[1])
        self.accuracy(logits, batch[1])
        self.every.update(logits.detach()[:, 0])
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        self.mean(loss.detach())
        self.log_dict(self.several(loss.detach()), on_step=True, on_epoch=False)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("spread", self.every.compute().std())
        self.every.reset()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))


def shuffled() -> DataLoader:
    x, y = (torch.cat(parts) for parts in zip(*classification(4), strict=True))
    return DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)


def with_validation() -> tuple[DataLoader, DataLoader]:
    return shuffled(), copies(classification(2, seed=5))


@dataclass
class Setup:
    """How to make one run."""

    module: Callable[[], pl.LightningModule]
    data: Callable[[], Any] = lambda: copies(classification(5))
    callbacks: Callable[[], list[pl.Callback]] = list
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, monitor: pl.Callback | None) -> Record:
        return watch(self.module, self.data, monitor, self.callbacks, **self.options)


def dict_batches() -> DataLoader:
    return copies([{"input": (x, "name"), "label": y} for x, y in classification(4)])


SETUPS = {
    "sgd": Setup(optimized(lambda p: torch.optim.SGD(p, lr=0.1))),
    "heavy ball": Setup(optimized(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))),
    "nesterov": Setup(optimized(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True))),
    "adam": Setup(optimized(lambda p: torch.optim.Adam(p, lr=0.01))),
    "adamw": Setup(optimized(lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1))),
    "rmsprop": Setup(optimized(lambda p: torch.optim.RMSprop(p, lr=0.01))),
    "noisy optimizer": Setup(optimized(lambda p: Langevin(p, lr=0.1))),
    "lbfgs": Setup(optimized(lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3))),
    "clip norm": Setup(regular(lambda: mlp(4, 6, 3)), options={"gradient_clip_val": 0.1}),
    "clip value": Setup(
        regular(lambda: mlp(4, 6, 3)), options={"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}
    ),
    "accumulation, ragged": Setup(regular(with_dropout), options={"accumulate_grad_batches": 3, "max_epochs": 2}),
    "two groups": Setup(lambda: Classifier(mlp(4, 6, 3), two_groups)),
    "scheduler": Setup(lambda: Classifier(mlp(4, 6, 3), scheduled)),
    "dropout": Setup(regular(with_dropout)),
    "batchnorm": Setup(regular(with_batchnorm)),
    "frozen layer": Setup(regular(with_frozen_layer)),
    "tied weights": Setup(regular(lambda: Tied().double())),
    "manual optimization": Setup(Manual),
    "dict batch": Setup(lambda: DictBatch(mlp(4, 6, 3), sgd), dict_batches),
    "metrics and validation": Setup(
        Measured, with_validation, options={"max_epochs": 3, "val_check_interval": 2, "num_sanity_val_steps": 1}
    ),
    "early stopping": Setup(
        Measured,
        with_validation,
        lambda: [EarlyStopping("val_loss", patience=1, min_delta=10.0)],
        {"max_epochs": 6},
    ),
    "weight averaging": Setup(
        Measured, shuffled, lambda: [StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2)], {"max_epochs": 3}
    ),
    "float32": Setup(
        lambda: Classifier(with_batchnorm().float(), sgd),
        lambda: copies(classification(4, dtype=torch.float32)),
        options={"precision": "32-true"},
    ),
    "bf16-mixed": Setup(
        lambda: Classifier(with_batchnorm().float(), sgd),
        lambda: copies(classification(4, dtype=torch.float32)),
        options={"precision": "bf16-mixed"},
    ),
}


@functools.cache
def unwatched(name: str) -> Record:
    """The run of a set-up without a monitor, made once."""
    return SETUPS[name].run(None)


def regression(count: int = 3, **_: Any) -> list[Batch]:
    g = torch.Generator().manual_seed(1)
    draw = lambda: torch.randn(8, 4, generator=g, dtype=torch.float64)  # noqa: E731
    return [(draw(), draw()[:, :3]) for _ in range(count)]
