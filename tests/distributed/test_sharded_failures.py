"""A forward or backward of sharded parameters (FSDP2) that fails on one of two processes alone costs a measurement."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.distributed import sharded_failing_jobs as jobs
from tests.distributed.cases import BATCHES, Outcome
from tests.distributed.compare import assert_same_state
from tests.helpers.processes import needs_fsdp2, run_on_ranks
from tests.helpers.runs import GROUPS

pytestmark = needs_fsdp2

Results = dict[str, list[Outcome]]


@pytest.fixture(scope="module")
def results() -> Any:
    """All runs of this file, by one pair of processes, which do not wait for each other longer than a minute."""
    return run_on_ranks(jobs.__name__, jobs.JOBS)


def like(results: Results, name: str, kind: str) -> list[Outcome]:
    """The run of the same module in which nothing fails, or which nobody watches."""
    family = name.partition("_")[0]
    names = (f"{kind}_{name}", f"{kind}_{family}", f"{family}_{kind}", kind)
    return next(results[one] for one in names if one in results)


@pytest.mark.parametrize("name", jobs.FORWARDS)
def test_one_measurement_is_lost(results: Results, name: str) -> None:
    _, failing = jobs.FORWARDS[name]
    for outcome, whole in zip(results[name], like(results, name, "whole"), strict=True):
        assert list(outcome.rows) == list(range(BATCHES))
        for step, row in outcome.rows.items():
            measured = [key for key in row if key.startswith("curvature/lambda") or key.endswith("sharpness")]
            assert measured
            assert [math.isnan(row[key]) for key in measured] == [step == failing] * len(measured), step
            if step != failing and name != "search":  # which starts where the one before has ended
                assert row == pytest.approx(whole.rows[step], rel=1e-12, nan_ok=True), step
    first, second = results[name]
    assert repr(first.metrics) == repr(second.metrics)


@pytest.mark.parametrize("name", jobs.LOOKS)
def test_a_look_that_fails_costs_what_it_looked_for(results: Results, name: str) -> None:
    """At kinks: nothing; at the head of the loss: the estimator that needs it."""
    first, second = results[name]
    for step, row in first.rows.items():
        own = {key: value for key, value in row.items() if key.startswith(GROUPS)}
        assert math.isfinite(own["curvature/lambda_fd"])
        assert math.isnan(own["curvature/lambda_kl"]) == name.startswith("headed")
        assert repr(own) == repr({key: second.rows[step][key] for key in own})


@pytest.mark.parametrize("name", [*jobs.FORWARDS, *jobs.LOOKS])
def test_training_goes_on_to_the_bit(results: Results, name: str) -> None:
    for watched, alone in zip(results[name], like(results, name, "unwatched"), strict=True):
        assert_same_state(watched, alone)


@pytest.mark.parametrize("name", [*jobs.FORWARDS, *jobs.LOOKS])
def test_nothing_is_gathered_but_what_all_gather(results: Results, name: str) -> None:
    first, second = (outcome.collectives for outcome in results[name])
    assert first == second
    # In a measurement that is lost as much as in another, but for one that was not begun.
    begun = "check" not in name and not name.startswith("unrecorded") and name not in ("hidden_1", "headed_1")
    if begun and name not in ("search", *jobs.LOOKS):
        assert first == like(results, name, "whole")[0].collectives
