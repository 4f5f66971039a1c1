"""One of two processes fails outside of products and evaluations: the other does not wait, and both go on, or none."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.distributed import alone_jobs as jobs
from tests.distributed.compare import assert_same_state
from tests.distributed.sharpness_cases import lost
from tests.helpers.processes import run_on_ranks
from tests.helpers.runs import GROUPS

Results = dict[str, list[Any]]

# A single draw has no standard error.
ALWAYS_LOST = {"step_sharpness_stderr"}
# Of those that do not lose everything.
LOST = {
    "in_the_preconditioner": ("preconditioned_lambda_max", "stability_headroom"),
    "in_collation": ("gni", "lambda_gen"),
    "in_collation_for_exact_products": ("ias", "zero_gradient_batches"),
}


@pytest.fixture(scope="module")
def results() -> Any:
    """All runs of this file, by one pair of processes."""
    return run_on_ranks(jobs.__name__, jobs.JOBS)


@pytest.mark.parametrize("name", [*jobs.SPECTRUM, *jobs.SHARPNESS])
def test_a_failure_on_one_rank_costs_one_measurement(results: Results, name: str) -> None:
    first, second = results[name]
    assert repr(first.rows) == repr(second.rows)
    failing = 0 if name == "in_saving_before_the_reading" else jobs.FAILING_STEP
    for step, row in first.rows.items():
        # Before its first step Adam has no preconditioner.
        of_it = ("preconditioned", "stability_headroom")
        undefined = ALWAYS_LOST | {key for key in row if step == 0 and key.startswith(of_it)}
        threshold = {key for key in row if key.endswith("_threshold") or key == "two_over_lr"}
        expected = {key for key in row if key.startswith(LOST.get(name, ""))} - threshold if step == failing else set()
        assert lost(row) - undefined == expected - undefined, step
    assert list(first.rows) == [0, 1, 2]


@pytest.mark.parametrize("name", [*jobs.SPECTRUM, *jobs.SHARPNESS])
def test_training_goes_on_as_if_nothing_had_failed(results: Results, name: str) -> None:
    kind = "spectrum" if name in jobs.SPECTRUM else "sharpness"
    for outcome, without in zip(results[name], results[f"{kind}_unwatched"], strict=True):
        assert all(outcome.intact)
        if name != "in_the_basis_of_shared_groups":  # which has steps of another size
            assert_same_state(outcome, without)


@pytest.mark.parametrize("name", ["in_saving", "in_making_the_loss", "in_the_basis", "after_the_last_product"])
def test_later_measurements_are_the_same_on_both_ranks(results: Results, name: str) -> None:
    whole, (first, second) = results["spectrum"][0], results[name]
    # The search begins elsewhere: the same to the square of the residual, 1e-3, over gaps of a tenth or so.
    for key in ("lambda_max", "lambda_2", "gauss_newton_lambda_max"):
        assert first.rows[2][key] == pytest.approx(whole.rows[2][key], rel=1e-4), key
    for kind, vectors in first.vectors[-1].items():
        assert all(a.equal(b) for a, b in zip(vectors, second.vectors[-1][kind], strict=True))


def test_each_rank_says_once_what_it_knows(results: Results) -> None:
    for name in (*jobs.SPECTRUM, *jobs.SHARPNESS):
        (elsewhere,), (here,) = (outcome.said for outcome in results[name])
        assert here.endswith(f": {jobs.MESSAGE}"), name
        assert elsewhere.endswith("failed on another rank; see that rank's log"), name


def test_nothing_is_measured_where_one_rank_is_not_ready(results: Results) -> None:
    for name in ("in_saving", "in_making_the_loss", "in_saving_for_batches", "in_keeping_the_batch"):
        for outcome in results[name]:
            assert outcome.collectives[jobs.FAILING_STEP] == 1, name
    # And no other collective than those of a whole measurement where a rank fails in one.
    for broken, whole in zip(results["in_collation"], results["sharpness"], strict=True):
        assert broken.collectives[jobs.FAILING_STEP] <= whole.collectives[jobs.FAILING_STEP] + 1


@pytest.mark.parametrize("name", jobs.MISTAKEN)
def test_a_mistake_on_one_rank_ends_both(results: Results, name: str) -> None:
    _, what = jobs.MISTAKEN[name]
    assert results[name] == [
        f"MisconfigurationException: {what} failed on another rank; see that rank's log",
        f"MisconfigurationException: {jobs.MESSAGE}",
    ]


def test_a_step_that_cannot_be_recorded_is_raised_on_both(results: Results) -> None:
    elsewhere, here = results["raised_in_recording"]
    assert elsewhere == "RuntimeError: preparing the measurement failed on another rank; see that rank's log"
    assert here.startswith("ValueError: training_step must not depend on what cannot be put back, got ['source']")


def test_outputs_on_one_rank_alone_cost_one_measurement(results: Results) -> None:
    first, second = results["outputs_on_one_rank"]
    for step, row in first.rows.items():
        measured = {key: value for key, value in row.items() if key.startswith(GROUPS)}
        assert repr(measured) == repr({key: second.rows[step][key] for key in measured})
        for key in ("curvature/lambda_fd", "curvature/lambda_kl"):
            assert math.isnan(row[key]) == (step == 0)
