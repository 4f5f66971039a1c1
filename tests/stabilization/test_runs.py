"""Runs with StabilizationMonitor are those without, bit for bit: modules in training mode, failures at the end."""

from __future__ import annotations

import functools
import math
from typing import Any

import lightning.pytorch as pl
import pytest

from lightning_curvature import CurvatureWarning
from lightning_curvature.stabilization.options import QUANTITIES
from tests.helpers.runs import Classifier
from tests.helpers.setups import sgd, with_batchnorm, with_dropout
from tests.helpers.stabilization import STAGES, Trapped, failing_in, monitor, samples, trap
from tests.helpers.witness import Record, assert_same, watch


@pytest.mark.parametrize("make", [with_dropout, with_batchnorm], ids=["dropout", "running statistics"])
@pytest.mark.filterwarnings("ignore:sigma must be small enough", "ignore:BatchNorm")
@pytest.mark.thinned(2)
def test_modules_in_training_mode(make: Any) -> None:
    """Masks are drawn, and statistics would move; single samples leave BatchNorm1d nothing to normalize by."""
    run = lambda follow: watch(lambda: Classifier(make(), sgd), samples, follow)  # noqa: E731
    follow = monitor(probe_mode="train")
    if make is with_dropout:
        watched = run(follow)
        for key in QUANTITIES:
            assert len(watched.curve(key)) > 1, key
            assert all(math.isfinite(value) for value in watched.curve(key)), key
    else:
        with pytest.warns(CurvatureWarning, match="logs NaN: ValueError: training_step must take a batch of one"):
            watched = run(follow)
    assert_same(run(None), watched)


@functools.cache
def unwatched() -> Record:
    return watch(Trapped, samples, None)


@pytest.mark.parametrize("stage", STAGES)
def test_failing_at_the_end_of_fit(stage: str) -> None:
    class Late(pl.Callback):
        def on_train_end(self, *args: Any) -> None:
            trap().stage = stage

    follow = monitor(every_n_train_steps=None)
    with failing_in(None), pytest.warns(CurvatureWarning, match="StabilizationMonitor logs NaN: Boom: trapped"):
        watched = watch(Trapped, samples, follow, lambda: [Late()])
    assert_same(unwatched(), watched)
    assert [math.isnan(value) for value in watched.curve("delta_2")] == [True]
    assert follow.result is None
