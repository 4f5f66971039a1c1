"""Runs under HessianSpectrumMonitor, and the dense matrices of their steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers.runs import Capture, make_trainer, rows, warned
from tests.helpers.spectrum import samples
from tests.oracles.hessian_spectrum import Curvature, Moments, Part

SAMPLES, BATCH, LR = 40, 8, 0.1


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=LR)


def batches(size: int = BATCH, count: int = SAMPLES) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*samples(count)), batch_size=size)


def parts(size: int = SAMPLES) -> list[Part]:
    return [Part(x, y) for x, y in batches(size)]


def fitted(
    module: Any, *callbacks: pl.Callback, data: Any = None, steps: int = 5
) -> tuple[dict[int, dict[str, float]], Moments, list[str]]:
    """Rows by step, moments, and what was said; training reaches its end."""
    capture, moments = Capture(), Moments()
    trainer = make_trainer(moments, *callbacks, logger=capture, max_steps=steps, max_epochs=-1)
    said = warned(lambda: trainer.fit(module, batches() if data is None else data))
    assert trainer.global_step == steps
    return rows(capture), moments, said


def trained(make: Callable[[], Any], *callbacks: pl.Callback) -> dict[str, Tensor]:
    """Parameters and buffers after training."""
    torch.manual_seed(0)
    module = make()
    fitted(module, *callbacks)
    return module.state_dict()


def assert_same_training(make: Callable[[], Any], *callbacks: pl.Callback) -> None:
    watched, alone = trained(make, *callbacks), trained(make)
    assert all(torch.equal(watched[name], value) for name, value in alone.items())


def hessian(module: Any, moments: Moments, step: int) -> Tensor:
    return Curvature(module.network, module.loss, moments.all[step]).hessian(parts())
