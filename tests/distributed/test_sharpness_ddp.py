"""Mini-batch sharpness under DDP: two processes against one with the same data, and failures on one of them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from lightning_curvature.batch_sharpness.options import PLATEAUS, QUANTITIES
from tests.distributed import sharpness_jobs as jobs
from tests.distributed.compare import assert_same_state
from tests.distributed.sharpness_cases import assert_complete, assert_same_sharpness, lost, same_text
from tests.distributed.sharpness_jobs import Results
from tests.helpers.processes import run_on_ranks

pytestmark = pytest.mark.slow

# Sums over the ranks in another order, of the gradients of two steps and of ∇L: hundreds of roundings of 1e-16. An
# eigenvalue owes 1e-12 to its residual, from another start on each rank. Measured: 5e-12.
ROUNDING = 1e-10


@pytest.fixture(scope="module")
def results() -> Any:
    """All runs of this file, by one pair of processes."""
    return run_on_ranks(jobs.__name__, [*jobs.JOBS, "raised"])


@pytest.mark.parametrize(
    "name",
    [
        "whole",
        "preconditioned",
        "accumulated",
        "uneven",
        "unused",
        "rare",
        "sized",
        "odd",
        "dropout",
        "exact",
        "in_turn_on_one_rank",
        "counted_fewest",
    ],
)
def test_values_are_those_of_one_process(results: Results, name: str) -> None:
    alone = getattr(jobs, name)()
    assert_complete(alone)
    assert_same_sharpness(results[name], alone, ROUNDING)
    assert same_text(*results[name])


@pytest.mark.parametrize("once", [True, False])
def test_losses_without_second_derivatives(results: Results, once: bool) -> None:
    """Each rank takes differences; they are those of one process, and nearly the exact products."""
    alone = replace(jobs.by_differences, module=partial(jobs.squaring, jobs.momentum, once=once))()
    # By differences no eigenvalue is known to the 1e-12 that is asked for, and that is said of all six mini-batches.
    assert alone.rows[0]["lambda_max_b_unconverged"] == (6.0 if once else 0.0)
    alone.rows[0]["lambda_max_b_unconverged"] = 6.0
    # Products to 1e-9 each, at a distance that each rank measures for itself.
    assert_same_sharpness(results["by_differences"], alone, 1e-6)
    first, second = results["by_differences"]
    assert same_text(first, second)
    assert [said.partition(",")[0] for said in first.said] == [
        "products with the Hessian are differences of gradients from here on"
    ]


def test_what_is_compared_is_not_one_number(results: Results) -> None:
    """Draws of other sizes and of other sets, that end at other places."""
    rows = {name: results[name][0].rows[0] for name in ("whole", "sized", "uneven")}
    for key in ("batch_sharpness", "ias", "gni", "lambda_gen", "lambda_max_b", "update_sharpness"):
        assert abs(rows["whole"][key] / rows["sized"][key] - 1.0) > 1e-3, key
        assert abs(rows["whole"][key] / rows["uneven"][key] - 1.0) > 1e-3, key
    batches = {value for key, value in rows["whole"].items() if key.endswith("_batches") and "zero" not in key}
    # Also after a pair that the second of two processes does not come to.
    assert len(batches) > 2
    assert any(count % 4 for count in batches)
    assert {value for key, value in results["odd"][0].rows[0].items() if key.endswith("_batches")} == {0.0, 6.0}


def test_batches_of_each_rank(results: Results) -> None:
    first, second = results["by_rank"]
    assert same_text(first, second)
    assert_complete(first)
    assert first.said == second.said == []


@pytest.mark.parametrize(("watched", "unwatched"), [("disturbed", "undisturbed"), ("unbroken", "unbroken_unwatched")])
def test_training_is_the_same_to_the_bit(results: Results, watched: str, unwatched: str) -> None:
    for with_monitor, without in zip(results[watched], results[unwatched], strict=True):
        assert with_monitor.rows
        assert not without.rows
        assert all(with_monitor.intact)
        assert_same_state(with_monitor, without)


def test_one_collective_a_pair(results: Results) -> None:
    """Eight batches are two pairs on each rank; ∇L is one more, that all are ready, the first time the reading."""
    for outcome in results["counted_alone"]:
        assert outcome.collectives == [4, 3]
    for outcome in results["counted_full"]:
        assert outcome.collectives == [5, 4]
    # Two vectors of a pair for each of GNI and λ_gen, on two ranks: each is sent round, and its curvature summed.
    for outcome in results["counted_exact"]:
        assert outcome.collectives == [5 + 32, 4 + 32]
    # All pairs at once; the first time ranks agree to do so.
    for outcome in results["counted_at_once"]:
        assert outcome.collectives == [4, 2]
    # Below ``min_batches`` nothing is decided: three pairs on each rank for one exchange, then the fourth.
    for outcome in results["counted_fewest"]:
        assert outcome.collectives == [4, 3]
    # The gradient and the product of the step's own batch; nothing is read.
    for outcome in results["counted_step"]:
        # The reading is of nothing, and all ranks must be ready for it.
        assert outcome.collectives == [3, 3]


@pytest.mark.parametrize("name", jobs.FAILING)
def test_a_failure_on_one_rank_is_nan_on_both(results: Results, name: str) -> None:
    unbroken, failed = (
        results["unbroken_exact" if "exact" in name else "unbroken"],
        getattr(jobs, name).module.keywords or getattr(jobs, name).module.args,
    )
    for outcome, whole in zip(results[name], unbroken, strict=True):
        gone = lost(outcome.rows[1])
        # The step's own batch and ∇L are measured by themselves; of what is drawn stays what was known by then.
        if name == "in_step":
            assert gone == {"step_sharpness", "step_sharpness_stderr"}
        elif "pair" in name and name != "in_second_pair":
            assert gone == set(outcome.rows[1]) - {"step_sharpness", "two_over_lr", *PLATEAUS}
        else:
            # These need ∇L; without exact products they also take more than one pair of each rank.
            needing = {key for key in outcome.rows[1] if key.startswith(("gni", "lambda_gen"))}
            assert gone == needing | {"step_sharpness_stderr"}
        for step in (0, 2):
            assert repr(outcome.rows[step]) == repr(whole.rows[step])
        assert all(outcome.intact)
        assert_same_state(outcome, whole)
    rank = failed[1]
    assert results[name][rank].said == [f"Observed logs NaN: RuntimeError: {jobs.MESSAGE}"]
    (elsewhere,) = results[name][1 - rank].said
    assert elsewhere.endswith("failed on another rank; see that rank's log")


def test_many_at_once_that_fail_are_measured_in_turn(results: Results) -> None:
    """On the one rank where they do; the other does not notice."""
    for outcome in results["in_many_at_once"]:
        assert_complete(outcome)
        assert outcome.said == []
    assert_same_sharpness(results["in_many_at_once"], results["unbroken"][0], ROUNDING)


def test_errors_are_raised_on_both_ranks(results: dict[str, list[list[str]]]) -> None:
    by_rank = results["raised"]
    for number, name in enumerate(jobs.FAILING):
        rank = getattr(jobs, name).module.args[1]
        assert by_rank[rank][number] == f"RuntimeError: {jobs.MESSAGE}"
        assert by_rank[1 - rank][number].endswith("failed on another rank; see that rank's log")


def test_all_quantities_take_part() -> None:
    assert set(QUANTITIES) <= set(jobs.whole(0, 1).rows[0])
