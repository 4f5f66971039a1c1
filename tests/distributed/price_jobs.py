"""Runs whose interval follows what a measurement costs, on ranks whose clocks do not agree."""

from __future__ import annotations

from typing import Any

import torch

from lightning_curvature import DirectionalCurvatureMonitor
from lightning_curvature.monitors import price
from tests.distributed.cases import Outcome, Spy, state_of
from tests.helpers.counting import on_forward
from tests.helpers.runs import Capture, Classifier, batched_samples, make_trainer, mlp

STEPS, EVERY = 80, 5


def run(rank: int, world_size: int, bound: float | None) -> Outcome:
    """One run; a forward takes one second on the first rank, and on the second three while it measures."""
    torch.manual_seed(0)
    module, capture, spy = Classifier(mlp(4, 6, 3), lambda m: torch.optim.SGD(m.parameters(), lr=0.1)), Capture(), Spy()
    follow = DirectionalCurvatureMonitor(
        estimators=("finite_difference",), every_n_train_steps=EVERY, max_overhead=bound, on_error="raise"
    )
    now = 0.0

    def passed(*args: Any) -> None:
        nonlocal now
        now += 3.0 if rank == 1 and follow._in_hook else 1.0

    parallel = {"strategy": "ddp", "devices": world_size} if world_size > 1 else {}
    # The spy counts from before the decision to before the measurement.
    trainer = make_trainer(spy, follow, logger=capture, max_steps=STEPS, max_epochs=-1, **parallel)
    real, price.clock = price.clock, lambda: now
    on_forward(module.network, passed)
    try:
        trainer.fit(module, batched_samples())
    finally:
        price.clock = real
    return Outcome(capture.rows, spy.collectives, [], spy.metrics, state_of(module, trainer), follow._interval)


def bounded(rank: int = 0, world_size: int = 1) -> Outcome:
    return run(rank, world_size, 0.25)


def unbounded(rank: int = 0, world_size: int = 1) -> Outcome:
    return run(rank, world_size, None)


JOBS = ["bounded", "unbounded"]
