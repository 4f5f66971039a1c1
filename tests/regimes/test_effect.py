"""A run with the monitor is the run without it, bit for bit, unless an action is asked for."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from lightning_curvature import RegimeMonitor
from tests.helpers.regimes import Oscillation, fit, monitor
from tests.helpers.setups import SETUPS, unwatched
from tests.helpers.witness import assert_same


@pytest.mark.filterwarnings("ignore::lightning_curvature.CurvatureWarning")
@pytest.mark.thinned(3)
@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("every", [1, 3])
def test_same_run(setup: str, every: int) -> None:
    follow = RegimeMonitor(every_n_train_steps=every, on_error="raise")
    watched = SETUPS[setup].run(follow)
    assert_same(unwatched(setup), watched)
    # Manual optimization that returns no loss has no regime.
    assert bool(watched.curve("regime")) == (setup != "manual optimization")


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copies_and_second_fits_begin_anew(make_copy: Callable[[Any], Any]) -> None:
    fresh = str(fit(Oscillation(), monitor(), ratio=1.02)[1])
    follow = monitor()
    fit(Oscillation(), follow, ratio=0.5)
    assert str(fit(Oscillation(), make_copy(follow), ratio=1.02)[1]) == fresh
    assert str(fit(Oscillation(), follow, ratio=1.02)[1]) == fresh


def test_two_of_them_need_distinct_prefixes() -> None:
    assert monitor().state_key != monitor(prefix="other").state_key
    one, two = monitor(), monitor(prefix="other")
    _, found = fit(Oscillation(), one, two, Oscillation(prefix="other"), ratio=1.02)
    assert one.result == two.result
    assert "regime" in found[0]


def test_a_state_of_another_monitor() -> None:
    with pytest.raises(ValueError, match=r"^the state of a RegimeMonitor must hold \['alarm', 'history', 'progress'"):
        monitor().load_state_dict({"theta": 1})
