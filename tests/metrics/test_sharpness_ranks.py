"""The metrics of mini-batch sharpness on two ranks give the numbers of one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_curvature.metrics import BatchSharpness
from tests.helpers.processes import run_on_ranks
from tests.helpers.sharpness_metrics import (
    BATCHES,
    CLOSE,
    METRICS,
    MOVING,
    RESTARTED,
    STILL,
    Point,
    every_metric,
    fed,
    made,
    quadratic,
    value_of,
)


def state(metric: Any) -> list[Any]:
    laws = metric.over_batch_sizes([1, 4]) if "data" in str(metric._shared) and metric._data else torch.zeros(1)
    return [metric.compute(), metric.standard_error(), metric.count(), laws]


def on_ranks(rank: int, world_size: int) -> dict[str, Any]:
    """Each rank has some of the draws, rank 1 none of the last kind, and goes on after it has looked."""
    found: dict[str, Any] = {}
    for name in METRICS:
        metric = made(name)
        # Unequal shares, of whole pairs.
        fed(metric, BATCHES[:4] if rank == 0 else BATCHES[4:])
        found[name] = [state(metric), float(metric.moments[0]), state(metric)]
    for name in ("batch", "modified"):
        metric = made(name)
        for _ in range(3 + rank):
            metric.update(*BATCHES[0])
        found[f"{name}, constant"] = state(metric)
    lonely = made("batch")
    if rank == 0:
        fed(lonely, BATCHES)
    found["lonely"] = state(lonely)
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


@every_metric
def test_two_ranks_give_the_numbers_of_one(name: str, by_rank: list[dict[str, Any]]) -> None:
    alone = made(name)
    fed(alone, BATCHES)
    expected = state(alone)
    if name == "step":
        last = [value_of(name, [BATCHES[3]]), value_of(name, [BATCHES[5]])]
        expected = [sum(last) / 2.0, abs(last[0] - last[1]) / 2.0, 2, torch.zeros(1)]
    for rank, found in enumerate(by_rank):
        (value, error, count, laws), own, again = found[name]
        close = RESTARTED if name == "lambda_max" else CLOSE
        assert value.item() == pytest.approx(float(expected[0]), **close)
        assert error.item() == pytest.approx(float(expected[1]), rel=10.0 * close["rel"])
        assert count == expected[2]
        assert torch.allclose(laws, expected[3], rtol=1e-10, atol=0.0)
        # Afterwards each has its own draws again, and looks another time.
        assert own == {"step": 1, "ias": 2 - rank, "gni": 2 - rank}.get(name, 4 - 2 * rank)
        assert [float(x) for x in again[:3]] == [float(x) for x in (value, error, count)]
        # The same bits on both.
        for mine, theirs in zip(found[name][0], by_rank[0][name][0], strict=True):
            assert torch.equal(torch.as_tensor(mine), torch.as_tensor(theirs))


def test_constant_draws_and_a_rank_without_any(by_rank: list[dict[str, Any]]) -> None:
    for found in by_rank:
        for name in ("batch", "modified"):
            value, error, count, _ = found[f"{name}, constant"]
            assert value.item() == value_of(name, BATCHES[:1])
            assert error.item() == 0.0
            assert count == 7
        value, _, count, _ = found["lonely"]
        assert value.item() == pytest.approx(value_of("batch", BATCHES), **CLOSE)
        assert count == 6
        assert found["skipped"] == 2
