"""StabilizationMonitor.evaluate(): before, after and during a fit, by any Trainer, and nothing is moved by it."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_curvature.stabilization.options import QUANTITIES
from lightning_curvature.stabilization.result import SampleGrowth
from tests.helpers.nested import Nested, everything
from tests.helpers.runs import make_trainer
from tests.helpers.setups import Measured
from tests.helpers.stabilization import Trapped, failing_in, monitor, samples
from tests.helpers.traps import Boom
from tests.helpers.witness import assert_same, difference, watch


def assert_left_alone(module: pl.LightningModule, trainer: pl.Trainer | None, **options: Any) -> SampleGrowth:
    before, follow = everything(module), monitor(**options)
    growth = follow.evaluate(module, samples(), trainer=trainer).result
    assert difference(before, everything(module)) is None
    assert follow.result is None  # nothing of the monitor changes
    assert {row.criterion for row in growth.rows} == set(QUANTITIES)
    assert all(math.isfinite(row.value) for row in growth.rows)
    return growth


def test_by_hand_before_any_fit() -> None:
    module, trainer = Nested(), make_trainer()
    growth = assert_left_alone(module, trainer)
    assert trainer.strategy.model is None
    assert trainer.optimizers == []
    with torch.no_grad():
        assert assert_left_alone(module, trainer).rows == growth.rows
    # A Trainer of its own computes in float32, on the device that Lightning finds.
    assert_left_alone(Nested(), None)


@pytest.mark.parametrize("inference", [True, False])
def test_by_hand_where_no_graphs_are_built(inference: bool) -> None:
    module = Nested()
    expected = assert_left_alone(module, make_trainer())
    with torch.inference_mode(inference), torch.no_grad():
        assert monitor().evaluate(module, samples(), trainer=make_trainer()).result.rows == expected.rows


def test_by_hand_after_a_fit() -> None:
    """On the module that came out, with the Trainer of the fit and with another one: what the monitor found at its end.

    The Trainer can go on afterwards.
    """
    follow = monitor(every_n_train_steps=None, probe_dataloader=samples())
    record = watch(Measured, samples, follow)
    assert follow.result is not None
    module, trainer = record.module, record.trainer
    held = trainer.strategy.model, trainer.optimizers, dict(trainer.callback_metrics), trainer.global_step
    for one in (trainer, make_trainer()):
        assert assert_left_alone(module, one).rows == follow.result.rows
    assert (trainer.strategy.model, trainer.optimizers, trainer.callback_metrics, trainer.global_step) == held
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, samples())
    assert trainer.global_step == 2 * held[-1]


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.thinned(2)
def test_by_hand_during_a_fit(own: bool) -> None:
    class ByHand(pl.Callback):
        def __init__(self) -> None:
            self.found: list[SampleGrowth] = []

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            self.found.append(assert_left_alone(pl_module, trainer if own else make_trainer()))

    by_hand = ByHand()
    run = lambda *callbacks: watch(Measured, samples, None, lambda: list(callbacks))  # noqa: E731
    assert_same(run(), run(by_hand))
    assert len(by_hand.found) == 2
    assert by_hand.found[0].rows != by_hand.found[1].rows


def test_by_hand_where_it_fails() -> None:
    module, trainer = Trapped(), make_trainer()
    before = everything(module)
    with failing_in("coefficients"), pytest.raises(Boom):
        monitor().evaluate(module, samples(), trainer=trainer)
    assert difference(before, everything(module)) is None
    assert trainer.strategy.model is None
    assert_left_alone(module, trainer)
