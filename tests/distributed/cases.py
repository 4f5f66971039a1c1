"""A run that one process, or two together, make of the same global batches, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_curvature import DirectionalCurvatureMonitor
from tests.helpers.counting import on_forward
from tests.helpers.runs import GROUPS, Batch, Capture, classification, loader, make_trainer

EVERY = ("hvp", "gauss_newton", "kl", "finite_difference", "critical")

# In steps. Runs are compared with each other, not with the truth: truncation is the same in both, rounding is not,
# and it is the smaller the further out the loss is probed.
EPSILON = 2.0

GLOBAL_BATCH = 16
BATCHES = 4


def batches(count: int = BATCHES, dtype: torch.dtype = torch.float64) -> list[Batch]:
    """Global batches of a classification."""
    return classification(count, GLOBAL_BATCH, dtype=dtype)


def momentum(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.3, momentum=0.9)


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=0.05, weight_decay=0.1)


def one_batch(count: int = 16) -> list[Batch]:
    """The same global batch again and again."""
    return batches(1) * count


def beyond_the_edge(module: nn.Module) -> torch.optim.Optimizer:
    """Gradient descent whose path flips at each step, on one batch."""
    return torch.optim.SGD(module.parameters(), lr=6.0)


@dataclass
class Outcome:
    """What a process has after a run.

    Attributes:
        rows: what the logger got, by step.
        collectives: how many collectives the process took part in, by batch.
        forwards: how often the network ran, by batch.
        metrics: the monitor's share of ``trainer.callback_metrics``, by batch.
        state: this process's part of parameters, buffers and optimizer state, and the state of the random numbers.
        global_step: optimizer steps made.
    """

    rows: dict[int, dict[str, float]]
    collectives: list[int]
    forwards: list[int]
    metrics: list[dict[str, float]]
    state: dict[str, Tensor]
    global_step: int


@dataclass
class Case:
    """A run, ready to be made by one process or several: each takes its rows of every global batch."""

    module: Callable[[], pl.LightningModule]
    batches: Callable[[], list[Batch]] = batches
    estimators: tuple[str, ...] = EVERY
    strategy: Callable[[], Any] | str = "ddp"
    monitor: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    callbacks: Callable[[], list[pl.Callback]] = list
    watched: bool = True

    def unwatched(self) -> Case:
        """The same run without the monitor."""
        return replace(self, watched=False)

    def __call__(self, rank: int = 0, world_size: int = 1) -> Outcome:
        options = {"estimators": self.estimators, "every_n_train_steps": 1, "epsilon": EPSILON} | self.monitor
        monitors = [DirectionalCurvatureMonitor(**options)] if self.watched else []
        spy, capture, module = Spy(), Capture(), self.module()
        strategy = self.strategy() if callable(self.strategy) else self.strategy
        parallel = {"strategy": strategy, "devices": world_size} if world_size > 1 else {}
        trainer = make_trainer(
            *monitors, spy, *self.callbacks(), logger=capture, use_distributed_sampler=False, **parallel, **self.trainer
        )
        own = [tuple(t.tensor_split(world_size)[rank] for t in batch) for batch in self.batches()]
        on_forward(module.network, spy.count)
        trainer.fit(module, loader(own))
        return Outcome(
            capture.rows, spy.collectives, spy.forwards, spy.metrics, state_of(module, trainer), trainer.global_step
        )


class Spy(pl.Callback):
    """Counts, and notes what other callbacks can watch. Stands behind the monitor."""

    def __init__(self) -> None:
        self.collectives: list[int] = []
        self.forwards: list[int] = []
        self.metrics: list[dict[str, float]] = []

    def count(self, network: nn.Module, inputs: Any, output: Any) -> None:
        self._forwards += 1

    def on_train_batch_start(self, *args: Any) -> None:
        self._begin, self._forwards = collectives(), 0

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.collectives.append(collectives() - self._begin)
        self.forwards.append(self._forwards)
        self.metrics.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(GROUPS)})


def collectives() -> int:
    """Collectives of this process so far, by the group's own count: it also sees those that DDP issues from C++."""
    return dist.group.WORLD._get_sequence_number_for_group() if dist.is_initialized() else 0


def state_of(module: nn.Module, trainer: pl.Trainer) -> dict[str, Tensor]:
    """This process's part of parameters, buffers and optimizer state, and the state of the random numbers."""
    state = dict(module.state_dict()) | {"random numbers": torch.get_rng_state()}
    for index, entries in enumerate(trainer.optimizers[0].state.values()):
        state |= {f"optimizer {index} {name}": v for name, v in entries.items() if isinstance(v, Tensor)}
    return {name: (v.to_local() if isinstance(v, DTensor) else v).detach().clone() for name, v in state.items()}
