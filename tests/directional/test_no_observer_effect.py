"""A run with the monitor is the run without it, bit for bit, whatever the optimizer and the Trainer do."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lightning_curvature import DirectionalCurvatureMonitor
from tests.helpers.setups import (
    SETUPS,
)
from tests.helpers.witness import ALL, FORWARD_ONLY, LAMBDAS, assert_same

torch.set_num_threads(1)


# The exact estimators come last and repeat the step at θ_t itself, which may leave things as the step did; the others
# end elsewhere.
@pytest.mark.parametrize(("every", "estimators"), [(1, ALL), (2, FORWARD_ONLY)], ids=["all", "forward-only"])
@pytest.mark.parametrize("name", SETUPS)
def test_same_run(name: str, every: int, estimators: Any, recwarn: pytest.WarningsRecorder) -> None:
    monitor = DirectionalCurvatureMonitor(estimators=estimators, every_n_train_steps=every)
    watched = SETUPS[name].run(monitor)
    assert_same(SETUPS[name].run(None), watched)
    # The monitor did measure, and all of it: what never ran cannot have disturbed anything.
    for key in (LAMBDAS[name] for name in estimators):
        measured = watched.curve(key)
        assert measured, key
        assert key in SETUPS[name].may_be_lost or any(math.isfinite(value) for value in measured), key
