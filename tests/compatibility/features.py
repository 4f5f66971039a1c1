"""Features of the Trainer: the other half of the matrix."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers.runs import Classifier, classification
from tests.helpers.witness import (
    Record,
    copies,
    watch,
)


class Learner(Classifier):
    """Draws masks, has momentum and a scheduler, and all the other steps."""

    def __init__(self) -> None:
        network = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 3)).double()
        super().__init__(network, self.optimizers_of)

    @staticmethod
    def optimizers_of(module: nn.Module) -> dict[str, Any]:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.3)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": StepLR(optimizer, 2, 0.9), "interval": "step"}}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))


class Normed(Learner):
    """With BatchNorm, for which weight averaging passes over the data once more."""

    def __init__(self) -> None:
        super().__init__()
        self.network.insert(1, nn.BatchNorm1d(6).double())


def data() -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Six batches to train on, the last of them ragged, and two to validate on."""
    x, y = (torch.cat(parts)[:44] for parts in zip(*classification(6), strict=True))
    return DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True), copies(classification(2, seed=5))


class Batches(callbacks.Timer):
    """What ``max_time`` makes, by a clock that counts batches."""

    def __init__(self, most: int) -> None:
        super().__init__(timedelta(seconds=most))
        self.seen = 0

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.seen += 1
        super().on_train_batch_end(*args, **kwargs)

    def time_elapsed(self, stage: Any = "train") -> float:
        return float(self.seen)


@dataclass(frozen=True)
class Feature:
    """A run of two epochs.

    Attributes:
        steps: optimizer steps at which a monitor of every third step has values.
        options: of the Trainer.
        callbacks: beside the monitor.
        make: the module.
        begun: steps that begin and are never made, which monitors of these names have values of, too.
    """

    steps: tuple[int, ...] = (0, 3, 6, 9)
    options: dict[str, Any] = field(default_factory=dict)
    callbacks: Callable[[], list[pl.Callback]] = list
    make: Callable[[], pl.LightningModule] = Learner
    begun: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def run(self, monitor: pl.Callback | None, *more: pl.Callback) -> Record:
        options = {"max_epochs": 2, "num_sanity_val_steps": 0} | self.options
        return watch(self.make, data, monitor, lambda: [*self.callbacks(), *more], **options)


FEATURES: dict[str, Feature] = {
    "plain": Feature(),
    "accumulation": Feature((0, 3), {"accumulate_grad_batches": 4}),
    # Six steps of the first epoch, two of the second.
    "accumulation by schedule": Feature(
        (0, 3, 6), callbacks=lambda: [GradientAccumulationScheduler(scheduling={0: 1, 1: 3})]
    ),
    "clipping by norm": Feature(options={"gradient_clip_val": 0.1}),
    "clipping by value": Feature(options={"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "overfit_batches": Feature((0, 3), {"overfit_batches": 2}),
    "limit_train_batches, number": Feature((0, 3), {"limit_train_batches": 3}),
    "limit_train_batches, share": Feature((0, 3), {"limit_train_batches": 0.5}),
    "limit_val_batches": Feature(options={"limit_val_batches": 1}),
    "no validation": Feature(options={"limit_val_batches": 0}),
    "validation within an epoch": Feature(options={"val_check_interval": 2}),
    "validation across epochs": Feature(options={"val_check_interval": 5, "check_val_every_n_epoch": None}),
    "validation within a window": Feature((0, 3), {"val_check_interval": 2, "accumulate_grad_batches": 4}),
    "inference_mode off": Feature(options={"inference_mode": False, "val_check_interval": 2}),
    "sanity checking": Feature(options={"num_sanity_val_steps": 2}),
    "detect_anomaly": Feature((0, 3), {"detect_anomaly": True, "limit_train_batches": 3}),
    "max_time not reached": Feature(options={"max_time": {"days": 1}}),
    "max_time reached": Feature((0, 3, 6), callbacks=lambda: [Batches(8)]),
    # Sharpness waits for the last batch of the window.
    "max_time reached within a window": Feature(
        (0,),
        {"accumulate_grad_batches": 2},
        lambda: [Batches(7)],
        begun=dict.fromkeys(("spectrum", "stabilization", "noise"), (3,)),
    ),
    # Within the second epoch.
    "max_steps": Feature((0, 3, 6), {"max_steps": 8, "max_epochs": -1}),
    "stochastic weight averaging": Feature(
        callbacks=lambda: [callbacks.StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1)]
    ),
    # One more pass in one window, without backward, which Lightning counts as a step.
    "stochastic weight averaging of BatchNorm": Feature(
        callbacks=lambda: [callbacks.StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1)],
        make=Normed,
        begun=dict.fromkeys(("spectrum", "sharpness", "stabilization", "noise"), (12,)),
    ),
}
if hasattr(callbacks, "WeightAveraging"):  # Lightning 2.6
    averaged = lambda: [callbacks.EMAWeightAveraging(decay=0.7)]  # noqa: E731
    FEATURES |= {
        "weight averaging": Feature(callbacks=lambda: [callbacks.WeightAveraging()]),
        "exponential averaging, validation within a window": Feature(
            (0, 3), {"val_check_interval": 2, "accumulate_grad_batches": 4}, averaged
        ),
        "exponential averaging": Feature(callbacks=averaged, make=Normed),
    }


@functools.cache
def plain(name: str) -> Record:
    """A run without a monitor, made once."""
    return FEATURES[name].run(None)
