"""A long run with all monitors, which often measure and sometimes fail: memory is flat, the run is the run without.

Two minutes on one core: ``pytest -m slow``.
"""

from __future__ import annotations

import gc
import math
import random
import warnings
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_curvature import (
    BatchSharpnessMonitor,
    CurvatureWarning,
    DirectionalCurvatureMonitor,
    HessianSpectrumMonitor,
    NoiseCovarianceMonitor,
    StabilizationMonitor,
)
from lightning_curvature.replay.isolation import ReplayTrainer
from tests.helpers.runs import Capture, make_trainer

STEPS, EVERY = 20_000, 200
# Of the repeated training steps one in so many fails, so that most measurements succeed and many do not.
FAILS = 50
KEYS = (
    "lambda_kl",
    "lambda_fd",
    "lambda_dir",
    "lambda_max",
    "hessian_trace",
    "batch_sharpness",
    "ias",
    "lambda_gen",
    "delta_1",
    "noise_gamma",
)


class Learner(pl.LightningModule):
    """A network with state, whose step fails now and then when it is repeated, and never in training."""

    def __init__(self, dice: random.Random | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 4))
        # A function: the state of the dice is not put back with that of the module.
        self.roll = (lambda: dice.randrange(FAILS)) if dice is not None else (lambda: 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if isinstance(self._trainer, ReplayTrainer) and self.roll() == 0:
            raise RuntimeError("no luck")
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS, eta_min=1e-3)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Counts(pl.Callback):
    """Tensors and all other objects that are alive, every thousand steps."""

    def __init__(self) -> None:
        self.tensors: list[int] = []
        self.objects: list[int] = []

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step % 1000 == 0:
            gc.collect()
            alive = gc.get_objects()
            self.objects.append(len(alive))
            self.tensors.append(sum(issubclass(type(one), Tensor) for one in alive))


def run(*callbacks: Any, dice: random.Random | None = None) -> tuple[Learner, Any, Capture]:
    capture, module = Capture(), Learner(dice)
    g = torch.Generator().manual_seed(5)
    data = TensorDataset(torch.randn(256, 8, generator=g), torch.randint(4, (256,), generator=g))
    torch.manual_seed(1)
    trainer = make_trainer(*callbacks, logger=capture, max_epochs=-1, max_steps=STEPS)
    trainer.fit(module, DataLoader(data, batch_size=16, shuffle=True))
    return module, trainer.optimizers[0].state_dict(), capture


@pytest.mark.soak
def test_twenty_thousand_steps() -> None:
    monitors = [
        DirectionalCurvatureMonitor(estimators=("kl", "finite_difference", "hvp"), every_n_train_steps=EVERY),
        HessianSpectrumMonitor(
            quantities=("lambda_max", "hessian_trace"), every_n_train_steps=EVERY, probe_samples=64, micro_batch_size=32
        ),
        BatchSharpnessMonitor(
            quantities=("batch_sharpness", "ias", "lambda_gen"), every_n_train_steps=EVERY, num_batches=16
        ),
        StabilizationMonitor(
            sample_sizes=(4,),
            candidates=2,
            subspace_dim=1,
            quantities=("delta_1", "delta_2_subspace"),
            validation_draws=2,
            at_end=False,
            every_n_train_steps=EVERY,
        ),
        NoiseCovarianceMonitor(
            parameter="network.0.weight", probe_samples=64, haar_draws=1, at_end=False, every_n_train_steps=EVERY
        ),
    ]
    counts = Counts()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CurvatureWarning)
        module, optimizer, capture = run(*monitors, counts, dice=random.Random(3))
    plain, expected, _ = run()
    for (name, a), b in zip(module.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    for index, state in expected["state"].items():
        assert all(torch.equal(value, optimizer["state"][index][name]) for name, value in state.items())

    # After the first thousand steps nothing is added but what the logger of the test keeps.
    assert len(counts.tensors) == STEPS // 1000
    assert max(counts.tensors[1:]) - min(counts.tensors[1:]) <= 2
    kept = sum(len(row) + 2 for row in capture.rows.values())
    assert counts.objects[-1] - counts.objects[0] <= kept

    for key in KEYS:
        curve = [row[f"curvature/{key}"] for row in capture.rows.values() if f"curvature/{key}" in row]
        assert len(curve) == STEPS // EVERY, key
        finite = [value for value in curve if math.isfinite(value)]
        # A measurement repeats the step a few to a hundred times.
        assert len(curve) // 4 <= len(finite) < len(curve), key
        assert max(map(abs, finite)) < 1e6, key
