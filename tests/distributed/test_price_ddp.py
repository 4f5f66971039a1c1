"""Ranks agree on the interval, by the mean of what they paid, with one collective where a measurement is due."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed import price_jobs as jobs
from tests.distributed.cases import Outcome
from tests.distributed.compare import assert_same_state
from tests.helpers.processes import run_on_ranks

Results = dict[str, list[Outcome]]


@pytest.fixture(scope="module")
def results() -> Any:
    return run_on_ranks(jobs.__name__, jobs.JOBS)


def measured(outcome: Outcome) -> list[int]:
    return [step for step, row in sorted(outcome.rows.items()) if "curvature/update_norm" in row]


def test_both_ranks_measure_the_same_steps(results: Results) -> None:
    first, second = results["bounded"]
    # Two forwards of one second and two of three: four in the mean, of which a quarter is sixteen.
    assert first.global_step == second.global_step == 20
    assert measured(first) == measured(second)
    assert [step for step in measured(first) if step > 20] == [40, 60]
    # By its own clock the first would have measured every tenth.
    assert jobs.bounded().global_step == 10


def test_one_collective_where_a_measurement_is_due(results: Results) -> None:
    for bounded, free in zip(results["bounded"], results["unbounded"], strict=True):
        assert_same_state(bounded, free)
        extra = [a - b for a, b in zip(bounded.collectives, free.collectives, strict=True)]
        due = [step for step, one in enumerate(extra) if one]
        assert set(extra) == {0, 1}
        # Once ten steps are known, at step 15, the interval is 20.
        assert due == [0, 5, 10, 15, 20, 40, 60]
        assert measured(bounded) == [0, 5, 10, 20, 40, 60]
