"""Draws of mini-batch sharpness that one rank lacks, skips, or has again and again."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_curvature.metrics import BatchSharpness
from tests.helpers.processes import run_on_ranks
from tests.helpers.sharpness_metrics import (
    BATCHES,
    CLOSE,
    MOVING,
    STILL,
    Point,
    fed,
    made,
    quadratic,
    value_of,
)
from tests.testers.metric_cases.means import errors


def on_ranks(rank: int, world_size: int) -> dict[str, Any]:
    """Draws that do not scatter, and a rank without any."""
    found: dict[str, Any] = {}
    step = made("step")
    fed(step, BATCHES[:4] if rank == 0 else BATCHES[4:])
    found["step"] = errors(step)
    for name in ("batch", "modified"):
        metric = made(name)
        for _ in range(3 + rank):
            metric.update(*BATCHES[0])
        found[f"{name}, constant"] = [metric.compute(), *errors(metric).values()]
    lonely = made("batch")
    if rank == 0:
        fed(lonely, BATCHES)
    found["lonely"] = [lonely.compute(), *errors(lonely).values()]
    still = BatchSharpness(Point(1.0), quadratic)
    still.update(STILL, STILL)
    if rank == 0:
        still.update(MOVING, MOVING)
    with still.sync_context():
        found["skipped"] = int(still.skipped)
    return found


@pytest.fixture(scope="module")
def by_rank() -> list[dict[str, Any]]:
    return run_on_ranks(__name__, ["on_ranks"])["on_ranks"]


def test_step_sharpness_scatters_over_ranks(by_rank: list[dict[str, Any]]) -> None:
    last = [value_of("step", [BATCHES[3]]), value_of("step", [BATCHES[5]])]
    for found in by_rank:
        # A difference loses ten units.
        assert found["step"]["standard_error"].item() == pytest.approx(abs(last[0] - last[1]) / 2.0, rel=1e-11)
        assert found["step"]["count"] == 2


def test_constant_draws_and_a_rank_without_any(by_rank: list[dict[str, Any]]) -> None:
    for found in by_rank:
        for name in ("batch", "modified"):
            value, error, count = found[f"{name}, constant"]
            assert value.item() == value_of(name, BATCHES[:1])
            assert error.item() == 0.0
            assert count == 7
        value, _, count = found["lonely"]
        assert value.item() == pytest.approx(value_of("batch", BATCHES), **CLOSE)
        assert count == 6
        assert found["skipped"] == 2
