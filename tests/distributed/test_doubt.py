"""A step of which there is doubt is measured once more by the head of its loss: by all ranks, or by none."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.distributed import doubtful_jobs as jobs
from tests.distributed.cases import BATCHES, Outcome
from tests.distributed.compare import assert_same_state
from tests.helpers.processes import needs_fsdp2, run_on_ranks
from tests.oracles.along_step import DIFFERENCE

KEY, ERROR = "curvature/lambda_kl", "curvature_diagnostics/lambda_kl_error"
Results = dict[str, list[Outcome]]


@pytest.fixture(scope="module")
def sharded() -> Any:
    """Runs with parameters in shards, by one pair of processes."""
    return run_on_ranks(jobs.__name__, jobs.SHARDED)


@pytest.fixture(scope="module")
def whole() -> Any:
    """Runs under DDP."""
    return run_on_ranks(jobs.__name__, jobs.DDP)


@needs_fsdp2
@pytest.mark.parametrize("name", ["sharded", "sharded_pair"])
def test_values_are_those_of_the_union_from_the_first_step_on(sharded: Results, name: str) -> None:
    expected = getattr(jobs, name)()
    for outcome in sharded[name]:
        assert list(outcome.rows) == list(expected.rows) == list(range(BATCHES))
        for step, row in outcome.rows.items():
            assert row[KEY] == pytest.approx(expected.rows[step][KEY], rel=DIFFERENCE)
            assert row[ERROR] < 1e-3


@needs_fsdp2
@pytest.mark.parametrize("name", ["sharded", "sharded_on_one"])
def test_all_ranks_look_for_the_head_also_where_one_alone_gives_reason(sharded: Results, name: str) -> None:
    first, second = sharded[name]
    assert first.collectives == second.collectives
    # The check and the step at θ_t − εd; then the head, for which the step is repeated twice, and that step again.
    (alone, _) = sharded["sharded_unwatched"]
    assert [a - b for a, b in zip(first.forwards, alone.forwards, strict=True)] == [5, 1, 1, 1]
    for step, row in first.rows.items():
        assert math.isfinite(row[KEY])
        assert row[KEY] == second.rows[step][KEY]


@needs_fsdp2
@pytest.mark.parametrize("name", jobs.sharded_failing)
def test_a_head_that_one_rank_cannot_cut_off_leaves_the_doubt_on_all(sharded: Results, name: str) -> None:
    first, second = sharded[name]
    assert first.collectives == second.collectives
    assert repr(first.metrics) == repr(second.metrics)
    for step, row in first.rows.items():
        assert row[KEY] == pytest.approx(sharded["sharded"][0].rows[step][KEY], rel=row[ERROR])
        assert row[ERROR] > 0.05


@needs_fsdp2
def test_a_step_that_cannot_be_measured_once_more_is_lost_alone(sharded: Results) -> None:
    first, second = sharded["sharded_lost"]
    assert first.collectives == second.collectives
    for step, row in first.rows.items():
        assert math.isnan(row[KEY]) if step == 0 else row[ERROR] < 1e-3


def test_a_loss_that_one_rank_cannot_read_has_no_value_on_any(whole: Results) -> None:
    first, second = whole["unread"]
    assert first.collectives == second.collectives
    for outcome in (first, second):
        assert list(outcome.rows) == list(range(BATCHES))
        for row in outcome.rows.values():
            assert math.isnan(row[KEY])
            assert math.isfinite(row["curvature/lambda_fd"])


def test_training_is_the_same_to_the_bit(whole: Results) -> None:
    for watched, alone in zip(whole["unread"], whole["unread_unwatched"], strict=True):
        assert_same_state(watched, alone)


@needs_fsdp2
@pytest.mark.parametrize("name", ["sharded", "sharded_lost", *jobs.sharded_failing])
def test_training_in_shards_is_the_same_to_the_bit(sharded: Results, name: str) -> None:
    for watched, alone in zip(sharded[name], sharded["sharded_unwatched"], strict=True):
        assert_same_state(watched, alone)
