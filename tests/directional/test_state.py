"""ε and the bracket of the line search are learned along the run, and go through a checkpoint."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.runs import classification, run
from tests.oracles.along_step import rows_of
from tests.testers.families.directional import DIRECTIONAL
from tests.testers.reports import Learner


def test_state_goes_round() -> None:
    monitor, twin = DIRECTIONAL.make(), DIRECTIONAL.make()
    run(Learner(), classification(2), monitor)
    twin.load_state_dict(monitor.state_dict())
    assert twin.state_dict() == monitor.state_dict()
    assert twin.state_dict() != DIRECTIONAL.make().state_dict()


def test_a_checkpoint_from_before_is_taken_up() -> None:
    """Its keys and their form: distance ε‖d‖, (κ, its history, offset, its history), start of the search."""
    history = [(0.5, 0.25)]
    saved: dict[str, Any] = {"distance": 0.125, "rounding": (2.0, history, 0.25, history), "critical_start": 4.0}
    monitor = DIRECTIONAL.make()
    monitor.load_state_dict(saved)
    assert monitor.state_dict() == saved
    (row,) = rows_of(run(Learner(), classification(1), monitor))
    # ε‖d‖, of ‖d‖ = η‖Δθ‖; products of two roundings.
    distance = row["epsilon"] * row["update_norm"] * 0.3
    assert distance == pytest.approx(saved["distance"], rel=1e-12)
    growth, first, offset, second, _ = monitor.state_dict()["rounding"]
    assert growth <= 2.0
    assert offset <= 0.25
    assert (first[0], second[0]) == (history[0], history[0])
    assert len(first) == len(second) == 2
