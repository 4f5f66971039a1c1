"""Clocks inside a real Trainer: they time everything between the first callback of the list and the last."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import Logger
from references import Step
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.data import DataLoader
from workloads import Batch, Cycle, Workload, loss_of

Beside = Callable[[pl.Trainer, pl.LightningModule, Step], None]


@dataclass(frozen=True)
class Spread:
    """Median of a sample with its quartiles, and the number of values."""

    middle: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarize at least two values."""
        low, _, high = quantiles(values, n=4, method="inclusive")
        return cls(median(values), low, high, len(values))

    def scaled(self, factor: float) -> Spread:
        """The same sample in another unit."""
        return Spread(self.middle * factor, self.low * factor, self.high * factor, self.count)


@dataclass
class Row:
    """What was noted of one step.

    Attributes:
        step: seconds from before the first callback's start of the batch to after the last one's end.
        forward: seconds of one forward and loss under ``no_grad``, right after the step.
        calls: calls of the network within the step.
    """

    step: float
    forward: float
    calls: int


class LastRow(Logger):
    """A logger that keeps the values written last: a Trainer without any logger would skip work that users pay for."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, float] = {}

    @property
    def name(self) -> str:
        """Name, as Lightning asks for one."""
        return "last_row"

    @property
    def version(self) -> str:
        """Version, as Lightning asks for one."""
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to keep."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Keep the row."""
        self.values.update(metrics)


@dataclass(frozen=True)
class Clock:
    """Where the work is done, and what a second is.

    Attributes:
        device: device to wait for.
        read: wall time, or the processor time of this process, which other programs on the machine hardly change.
    """

    device: torch.device
    read: Callable[[], float] = time.perf_counter

    def now(self) -> float:
        """Seconds, with nothing left to do on the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.read()


def forward_only(trainer: pl.Trainer, module: pl.LightningModule, batch: Batch) -> None:
    """One forward and its loss, as the step computes them but without a graph, logs or hooks of the Trainer."""
    with torch.no_grad(), trainer.precision_plugin.train_step_context():
        loss_of(module, batch)


def named(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters."""
    return {name: p.detach().clone() for name, p in module.named_parameters()}


class Opening(pl.Callback):
    """First in the list: starts the clock, before it keeps θ_t of the steps that are looked at afterwards."""

    def __init__(self, clock: Clock, looked_at: Callable[[int], bool]) -> None:
        self.clock = clock
        self.looked_at = looked_at
        self.before: dict[str, Tensor] | None = None
        self.lr = 0.0
        self.started = 0.0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Start the clock."""
        self.before = named(pl_module) if self.looked_at(batch_idx) else None
        self.lr = trainer.optimizers[0].param_groups[0]["lr"]
        self.started = self.clock.now()


class Closing(pl.Callback):
    """Last in the list: stops the clock, times a forward, and lets others look at the finished step."""

    def __init__(self, opening: Opening, beside: Beside | None = None) -> None:
        self.opening = opening
        self.beside = beside
        self.rows: list[Row] = []
        self._calls = 0

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Count the calls of the network at its first layer, which every forward passes once."""
        first = weakref.ref(next(m for m in pl_module.modules() if next(m.children(), None) is None))

        # Of all modules: what its own hooks count is within its reach, and would be put back by a measurement.
        def count(module: nn.Module, args: Any) -> None:
            self._calls += module is first()

        self._counting = register_module_forward_pre_hook(count)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Stop counting."""
        self._counting.remove()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop the clock."""
        clock = self.opening.clock
        stopped, calls = clock.now(), self._calls
        forward_only(trainer, pl_module, batch)
        self.rows.append(Row(stopped - self.opening.started, clock.now() - stopped, calls))
        if self.beside is not None and self.opening.before is not None:
            self.beside(trainer, pl_module, Step(self.opening.before, named(pl_module), batch, self.opening.lr))
        self._calls = 0


def fit(
    workload: Workload, device: torch.device, steps: int, callbacks: Sequence[pl.Callback], logger: Logger | None = None
) -> pl.Trainer:
    """Train the workload from its start for a number of steps."""
    trainer = pl.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        precision=workload.precision,
        max_epochs=1,
        max_steps=steps,
        logger=logger or LastRow(),
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        log_every_n_steps=50,
    )
    trainer.fit(workload.make(), DataLoader(Cycle(workload.batches, steps), batch_size=None))  # type: ignore[arg-type]
    return trainer
