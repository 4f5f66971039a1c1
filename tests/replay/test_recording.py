"""The wrapper of a training step that is recorded."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import lightning.pytorch as pl

from lightning_curvature.replay.recording import recorded_through
from tests.helpers.faults import Fault, Tracer


class Counted(pl.LightningModule):
    def training_step(self, batch: int) -> int:
        return batch


def test_a_fault_takes_the_wrapper_off_and_costs_no_later_recording() -> None:
    module, heard = Counted(), list[int]()

    def record(step: Any, batch: int) -> Any:
        heard.append(batch)
        return step(batch)

    def attempt(tracer: Tracer | None) -> None:
        sys.settrace(tracer)
        try:
            with recorded_through(module, record), recorded_through(module, lambda step, batch: step(batch)):
                pass
        finally:
            sys.settrace(None)

    attempt(clean := Tracer())
    for number, (line, visit) in enumerate((line, v) for line, n in clean.visits.items() for v in range(1, n + 1)):
        with contextlib.suppress(Fault):
            attempt(Tracer((line, visit)))
        assert "training_step" not in vars(module), (line, visit)
        with recorded_through(module, record):
            assert module.training_step(number) == number
        assert heard.pop() == number, (line, visit)
