"""Evaluations that fail on one of two processes, or on both."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.distributed import failing_jobs as jobs
from tests.distributed.cases import BATCHES, Outcome
from tests.distributed.compare import assert_same_state
from tests.helpers.processes import needs_fsdp2, outcomes, run_on_ranks
from tests.helpers.runs import GROUPS

pytestmark = needs_fsdp2

Results = dict[str, list[Outcome]]

# A job that ends does so within seconds; the default time after which a collective gives up is half an hour.
ENDING_SECONDS = 90


@pytest.fixture(scope="module")
def results() -> Any:
    """All runs that go on to the end, by one pair of processes."""
    return run_on_ranks(jobs.__name__, [*jobs.DDP_JOBS, *jobs.FSDP2_JOBS, "at_first_step"])


def assert_lost_one_step(together: list[Outcome]) -> None:
    """NaN at the failing step on both ranks, numbers at all others, no other key than usual."""
    for outcome in together:
        assert list(outcome.rows) == list(range(BATCHES))
        for step, row in outcome.rows.items():
            names = [key for key in row if key.startswith("curvature/lambda") or key.endswith("sharpness")]
            assert names
            assert [math.isnan(row[name]) for name in names] == [step == jobs.FAILING_STEP] * len(names), step


@pytest.mark.parametrize("name", [name for name in jobs.DDP_JOBS if name != "unwatched"])
def test_failure_on_one_rank_costs_one_measurement(results: Results, name: str) -> None:
    assert_lost_one_step(results[name])
    for watched, alone in zip(results[name], results["unwatched"], strict=True):
        assert_same_state(watched, alone)
    first, second = results[name]
    assert first.metrics == second.metrics


@pytest.mark.parametrize("name", ["sharded", "sharded_search"])
def test_failure_inside_a_sharded_forward_costs_one_measurement(results: Results, name: str) -> None:
    assert_lost_one_step(results[name])
    for watched, alone in zip(results[name], results["sharded_unwatched"], strict=True):
        assert_same_state(watched, alone)


def test_all_ranks_evaluate_at_the_same_distance_after_a_failed_first_step(results: Results) -> None:
    first, second = results["at_first_step"]
    for step in range(1, BATCHES):
        own = {key: value for key, value in first.rows[step].items() if key.startswith(GROUPS)}
        assert math.isfinite(own["curvature_diagnostics/epsilon"])
        assert own == {key: second.rows[step][key] for key in own}
    # Half a norm is no norm: nothing of a failed step may pass for a value of the job.
    for outcome in (first, second):
        assert all(math.isnan(outcome.rows[0][f"curvature/{key}"]) for key in ("update_norm", "descent", "lambda_kl"))


def test_raising_raises_on_both_ranks() -> None:
    first, second = run_on_ranks(jobs.__name__, ["raised"])["raised"]
    assert len(first) == len(jobs.fatal)
    assert all("failed on another rank" in end for end in first)
    assert second == [f"RuntimeError: {jobs.MESSAGE}"] * len(jobs.fatal)


def test_raising_ends_both_processes() -> None:
    """By an error, long before a collective that one of them never enters gives up."""
    first, second = outcomes(jobs.__name__, ["fatal_search"], collective_seconds=1800, seconds=ENDING_SECONDS)
    assert "failed on another rank; see that rank's log" in first["error"].splitlines()[-1]
    assert second["error"].splitlines()[-1] == f"RuntimeError: {jobs.MESSAGE}"
