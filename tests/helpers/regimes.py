"""Runs whose regime is known: quadratics, and a monitor that computes the oscillation of their steps in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_curvature import RegimeMonitor
from lightning_curvature.monitors.base import Monitor
from lightning_curvature.monitors.options import MonitorOptions
from tests.helpers.runs import Capture, MakeOptimizer, make_trainer, rows


class Quadratic(pl.LightningModule):
    """½ Σ a x² + offset, whose largest eigenvalue is the first of ``curvatures``."""

    def __init__(self, make_optimizer: MakeOptimizer, curvatures: Sequence[float] = (10.0, 1.0), offset: float = 1.0):
        super().__init__()
        self.x = nn.Parameter(torch.full((len(curvatures),), 0.1, dtype=torch.float64))
        self.register_buffer("curvatures", torch.tensor(curvatures, dtype=torch.float64))
        self.make_optimizer, self.offset = make_optimizer, offset

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = 0.5 * (self.curvatures * self.x * self.x).sum() + self.offset
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self)


class Oscillation(Monitor):
    """Writes λ_osc, cosine and growth of each step of a :class:`Quadratic` after it, by their definition, P = 1."""

    def __init__(self, every: int = 1, prefix: str = "curvature") -> None:
        super().__init__(MonitorOptions(every_n_train_steps=every, prefix=prefix))
        self.kept: list[Tensor] = []  # the path before, of a resumed run

    def _begin(self) -> None:
        super()._begin()
        self.path: list[Tensor] = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.path = [*self.kept, pl_module.x.detach().clone()]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.path.append(pl_module.x.detach().clone())
        found = dict.fromkeys(("lambda_osc", "oscillation_cosine", "oscillation_growth"), math.nan)
        if len(self.path) >= 5:
            x = self.path[-5:]
            d = [before - after for before, after in itertools.pairwise(x)]
            s, t = d[3] - 2 * d[2] + d[1], d[2] - 2 * d[1] + d[0]
            found["oscillation_cosine"] = float(s @ t / (s.norm() * t.norm()))
            found["oscillation_growth"] = float(s.norm() / t.norm())
            found["lambda_osc"] = float(s @ (pl_module.curvatures * s) / (s @ s))
        if (trainer.global_step - 1) % self.options.every_n_train_steps == 0:
            self._write(trainer, found)


class Raise(pl.Callback):
    """Multiplies the learning rate by a factor before a step."""

    def __init__(self, at: int, factor: float) -> None:
        self.at, self.factor = at, factor

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.at:
            for group in trainer.optimizers[0].param_groups:
                group["lr"] *= self.factor


class Rates(pl.Callback):
    """Notes the learning rate with which each step is made."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.found.append(optimizer.param_groups[0]["lr"])


def sgd(ratio: float, momentum: float = 0.0) -> MakeOptimizer:
    """An optimizer whose threshold is 10/ratio: that of the default quadratic stands at this ratio."""
    return lambda module: torch.optim.SGD(
        module.parameters(), lr=(2.0 + 2.0 * momentum) * ratio / 10.0, momentum=momentum
    )


def steps(count: int) -> DataLoader[Any]:
    return DataLoader([torch.zeros(1)] * count, batch_size=None)  # type: ignore[arg-type]


def fit(
    *callbacks: pl.Callback, ratio: float = 0.5, count: int = 60, module: Any = None, **options: Any
) -> tuple[pl.Trainer, dict[int, dict[str, float]]]:
    """Steps of a quadratic; the trainer and what the monitors have logged."""
    capture = Capture()
    given, resume = options.pop("logger", None), options.pop("resume", None)
    trainer = make_trainer(*callbacks, logger=[capture, given] if given else capture, **options)
    trainer.fit(module or Quadratic(sgd(ratio)), steps(count), ckpt_path=resume)
    return trainer, rows(capture)


def monitor(**options: Any) -> RegimeMonitor:
    return RegimeMonitor(**({"on_error": "raise", "batches": "full", "every_n_train_steps": 1} | options))
