"""Two processes judge and act alike, by the mean of their losses, with one collective a judged step."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed import regime_jobs as jobs
from tests.distributed.cases import Outcome
from tests.distributed.compare import assert_same_state
from tests.helpers.processes import run_on_ranks

Results = dict[str, list[Outcome]]


@pytest.fixture(scope="module")
def results() -> Any:
    return run_on_ranks(jobs.__name__, jobs.JOBS)


def own(outcome: Outcome) -> dict[int, dict[str, float]]:
    keys = ("curvature/regime", "curvature/regime_alarm", "curvature/edge_ratio")
    return {step: {key: row[key] for key in keys if key in row} for step, row in outcome.rows.items()}


@pytest.mark.parametrize("name", ["lowered", "stopped", "watched"])
def test_regimes_and_alarms_are_those_of_one_process(results: Results, name: str) -> None:
    alone = getattr(jobs, name)()
    first, second = results[name]
    assert [row["train_loss"] for row in first.rows.values()] == [row["train_loss"] for row in second.rows.values()]
    assert str(own(first)) == str(own(second)) == str(own(alone))
    # The mean over the ranks, to the rounding of one sum; regimes alone would not tell it from the sum.
    means = [[row["loss"] for row in outcome.metrics] for outcome in (first, second, alone)]
    assert means[0] == means[1] == pytest.approx(means[2], rel=1e-15)
    if name != "watched":
        assert any(row["curvature/regime_alarm"] for row in own(alone).values())
    assert first.global_step == second.global_step == alone.global_step


def test_actions_leave_both_ranks_the_same(results: Results) -> None:
    alone = jobs.lowered()
    for outcome in results["lowered"]:
        assert_same_state(outcome, results["lowered"][0])
    assert (results["lowered"][0].state["x"] == alone.state["x"]).all()
    assert results["stopped"][0].global_step < jobs.COUNT


def test_one_collective_a_judged_step(results: Results) -> None:
    for watched, unwatched in zip(results["watched"], results["unwatched"], strict=True):
        assert_same_state(watched, unwatched)
        extra = [a - b for a, b in zip(watched.collectives, unwatched.collectives, strict=True)]
        assert extra == [int(step % jobs.EVERY == 0) for step in range(jobs.COUNT)]


def test_one_file_for_both_ranks(results: Results) -> None:
    assert [outcome.metrics for outcome in results["saved"]] == [jobs.saved().metrics] * 2
    assert len(results["saved"][0].metrics[0]) == 1
