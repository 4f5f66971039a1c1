"""Runs in which the stability index is measured: by two ranks, or by one that accumulates their batches."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from lightning_curvature import StabilityMonitor
from lightning_curvature.stability.result import StabilityResult
from tests.distributed.cases import Spy, batches, state_of
from tests.distributed.fsdp2_jobs import Sharded
from tests.helpers.runs import Capture, Classifier, loader, make_trainer, mlp, rows

STEPS = 14


def momentum(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.3, momentum=0.9)


def adam(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(module.parameters(), lr=0.02)


@dataclass
class Outcome:
    """What a process has after a run."""

    rows: dict[int, dict[str, float]]
    result: StabilityResult | None
    collectives: list[int]
    state: dict[str, Tensor]


@dataclass
class Case:
    """A run of so many steps; one process passes the batches of both ranks one after the other."""

    make: Any = momentum
    kind: type[Classifier] = Classifier
    strategy: Any = "ddp"
    precision: str = "64-true"
    monitor: dict[str, Any] = field(default_factory=dict)
    watched: bool = True

    def unwatched(self) -> Case:
        """The same run without the monitor."""
        return replace(self, watched=False)

    def __call__(self, rank: int = 0, world_size: int = 1) -> Outcome:
        options = {"every_n_train_steps": 1, "decay": 0.6, "on_error": "raise", "probe_precision": None}
        monitors = [StabilityMonitor(**(options | self.monitor))] if self.watched else []
        spy, capture, module = Spy(), Capture(), self.kind(mlp(4, 6, 3), self.make)
        strategy = self.strategy() if callable(self.strategy) else self.strategy
        parallel: dict[str, Any] = {"strategy": strategy, "devices": 2} if world_size > 1 else {}
        own = {} if world_size > 1 else {"accumulate_grad_batches": 2}
        trainer = make_trainer(
            spy,  # marks the start of a batch before the measurement
            *monitors,
            logger=capture,
            use_distributed_sampler=False,
            precision=self.precision,
            **parallel,
            **own,
        )
        halves = [tuple(zip(*(t.tensor_split(2) for t in batch), strict=True)) for batch in batches(STEPS)]
        data = [both[rank] for both in halves] if world_size > 1 else [half for both in halves for half in both]
        trainer.fit(module, loader(data))
        result = monitors[0].result if monitors else None
        return Outcome(rows(capture), result, spy.collectives, state_of(module, trainer))


strategy = partial(ModelParallelStrategy, data_parallel_size=2, tensor_parallel_size=1)
whole, preconditioned = Case(), Case(adam)
seldom = Case(monitor={"every_n_train_steps": 2})
seldom_unwatched = seldom.unwatched()
# The strategy refuses "64-true", but leaves a float64 module as it is under "32-true".
sharded = Case(kind=Sharded, strategy=strategy, precision="32-true")
sharded_unwatched = sharded.unwatched()

JOBS = [name for name, value in list(globals().items()) if isinstance(value, Case)]
