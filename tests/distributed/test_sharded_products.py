"""A product with the Hessian by sharded parameters (FSDP2) that fails on one of two processes alone."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed import sharded_product_jobs as jobs
from tests.distributed.compare import assert_same_state
from tests.distributed.failing_jobs import MESSAGE
from tests.distributed.sharpness_cases import lost
from tests.helpers.processes import needs_fsdp2, run_on_ranks

pytestmark = [needs_fsdp2, pytest.mark.slow]

Results = dict[str, list[Any]]


@pytest.fixture(scope="module")
def results() -> Any:
    """All runs of this file, by one pair of processes, which do not wait for each other longer than a minute."""
    return run_on_ranks(jobs.__name__, jobs.JOBS)


def assert_told(results: Results, name: str) -> None:
    """Each rank says once what it knows, and only the first that products are differences."""
    elsewhere, here = (outcome.said for outcome in results[name])
    assert len(elsewhere) == 2
    assert elsewhere[1].endswith("failed on another rank; see that rank's log")
    assert here == [f"Observed logs NaN: RuntimeError: {MESSAGE}"]


@pytest.mark.parametrize("name", jobs.SPECTRUM)
def test_one_spectrum_is_lost(results: Results, name: str) -> None:
    failing = 0 if name.startswith("at_first") else 1
    name = f"spectrum_{name}"
    for outcome, whole, alone in zip(
        results[name], results["spectrum_whole"], results["spectrum_unwatched"], strict=True
    ):
        assert all(outcome.intact)
        assert_same_state(outcome, alone)
        for step, row in outcome.rows.items():
            measured = {key for key in row if not key.endswith("threshold")}
            assert lost(row) == (measured if step == failing else set())
            # The search begins elsewhere than where none is lost: the same to the square of the residual.
            assert step == failing or row["lambda_max"] == pytest.approx(whole.rows[step]["lambda_max"], rel=1e-4)
    assert_told(results, name)
    first, second = (outcome.collectives for outcome in results[name])
    assert first == second


@pytest.mark.parametrize("name", jobs.SHARPNESS)
def test_one_sharpness_is_lost(results: Results, name: str) -> None:
    _, keys = jobs.SHARPNESS[name]
    name = f"sharpness_{name}"
    for outcome, alone in zip(results[name], results["sharpness_unwatched"], strict=True):
        assert all(outcome.intact)
        assert_same_state(outcome, alone)
        for step, row in outcome.rows.items():
            gone = {key for key in row if key.startswith(keys)} if step == 1 else set()
            assert lost(row) - {"step_sharpness_stderr"} == gone - {"step_sharpness_stderr"}, step
    assert_told(results, name)
    first, second = (outcome.collectives for outcome in results[name])
    assert first == second


def test_a_pair_that_one_rank_passes_over_is_left_out(results: Results) -> None:
    for outcome, alone in zip(results["passed_over"], results["sharpness_unwatched"], strict=True):
        assert_same_state(outcome, alone)
        assert lost(outcome.rows[1]) == {"step_sharpness_stderr", "gni_stderr"}  # of a single pair
        assert outcome.rows[1]["batch_sharpness_batches"] == 4.0
    first, second = results["passed_over"]
    assert repr(first.rows) == repr(second.rows)
    assert "1 of 2 pairs" in first.said[1]
