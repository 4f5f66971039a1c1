"""A run with NoiseCovarianceMonitor is the run without it, bit for bit; and so is a module that is measured by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_curvature import CurvatureWarning
from lightning_curvature.noise.options import QUANTITIES
from tests.helpers.habits import HABITS, Habitual
from tests.helpers.nested import Nested, everything
from tests.helpers.noise_runs import KEYS, monitor, samples
from tests.helpers.runs import Classifier, classification, make_trainer
from tests.helpers.setups import Measured, sgd, with_batchnorm, with_dropout
from tests.helpers.witness import Record, assert_same, copies, difference, watch


def assert_measured(watched: Record, which: Callable[[Any], bool] = all) -> None:
    """The monitor did measure: what never ran cannot have disturbed anything."""
    for key in KEYS[1:]:
        values = watched.curve(key)
        assert len(values) > 1, key
        assert which(math.isfinite(value) for value in values), key


@pytest.mark.parametrize("make", [with_dropout, with_batchnorm], ids=["dropout", "running statistics"])
@pytest.mark.filterwarnings("ignore:BatchNorm")
def test_modules_in_training_mode(make: Any) -> None:
    """Masks are drawn, and statistics would move; single samples leave BatchNorm1d nothing to normalize by."""
    run = lambda follow: watch(lambda: Classifier(make(), sgd), samples, follow)  # noqa: E731
    follow = monitor(probe_mode="train", quantities=QUANTITIES[:-1])
    if make is with_dropout:
        watched = run(follow)
        assert_measured(watched)
    else:
        with pytest.warns(
            CurvatureWarning,
            match=r"logs NaN: ValueError: training_step must take a batch of one .* \(Expected more than 1 value",
        ):
            watched = run(follow)
    assert_same(run(None), watched)


@pytest.mark.filterwarnings("ignore::lightning_curvature.CurvatureWarning")
def test_a_parameter_that_the_step_takes_the_gradient_from() -> None:
    """It cannot be measured, and nothing of the run shows that it was tried."""

    def run(follow: Any) -> Record:
        return watch(lambda: Habitual(HABITS["changes_modes_and_flags"]), lambda: copies(classification(2)), follow)

    watched = run(monitor("network.0.bias"))
    assert_same(run(None), watched)
    assert all(len(watched.curve(key)) > 1 for key in KEYS[1:])


@pytest.mark.parametrize("trainer", [make_trainer, lambda: None])
@pytest.mark.parametrize("name", ["inner.network.0.0.weight", "inner.network.0.0.bias", "head.0.weight"])
@pytest.mark.filterwarnings("ignore:noise_")
@pytest.mark.thinned(4)
def test_by_hand(name: str, trainer: Any) -> None:
    """Before any fit, where nothing is moved; also where no graphs are built."""
    module, follow = Nested(), monitor(name, quantities=QUANTITIES[:-1])
    before = everything(module)
    result = follow.evaluate(module, samples(), trainer=trainer()).result
    assert difference(before, everything(module)) is None
    assert follow.result is None  # nothing of the monitor changes
    with torch.inference_mode(), torch.no_grad():
        again = follow.evaluate(module, samples(), trainer=trainer()).result
    assert str(again.values(QUANTITIES[:-1])) == str(result.values(QUANTITIES[:-1]))
    assert difference(before, everything(module)) is None


@pytest.mark.slow
def test_by_hand_after_and_during_a_fit() -> None:
    class ByHand(pl.Callback):
        def __init__(self) -> None:
            self.found: list[str] = []

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            result = monitor(first).evaluate(pl_module, samples(), trainer=trainer).result
            self.found.append(str(result.values(QUANTITIES)))

    first = next(name for name, _ in Measured().named_parameters())
    by_hand, follow = ByHand(), monitor(first, every_n_train_steps=None)
    plain = watch(Measured, samples, None)
    assert_same(plain, watch(Measured, samples, None, lambda: [by_hand]))
    assert len(set(by_hand.found)) == 2
    record = watch(Measured, samples, follow)
    assert_same(plain, record)
    assert follow.result is not None
    again = monitor(first).evaluate(record.module, samples(), trainer=make_trainer()).result
    assert str(again.values(QUANTITIES)) == str(follow.result.values(QUANTITIES))
