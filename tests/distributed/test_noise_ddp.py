"""The noise covariance under DDP: two processes against one with the same data, and failures on one of them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from lightning_curvature.noise.result import NoiseCurvature
from tests.distributed import noise_jobs as jobs
from tests.distributed.compare import assert_same_state
from tests.distributed.noise_cases import assert_same_noise, assert_same_result
from tests.distributed.noise_jobs import Results
from tests.helpers.processes import run_on_ranks

pytestmark = pytest.mark.slow

# Sums over the ranks in another order, in two steps of training, too: hundreds of roundings of 1e-16.
ROUNDING = 1e-10
MORE = ["raised", "communication", "unequal", "by_hand"]


@pytest.fixture(scope="module")
def results() -> Any:
    """All runs of this file, by one pair of processes."""
    return run_on_ranks(jobs.__name__, [*jobs.JOBS, *MORE])


ROUTES = {"general": "general", "forced": "general", "one_general": "general", "late": "general"}


@pytest.mark.parametrize(
    "name",
    ["kronecker", "last_layer", "general", "forced", "accumulated", "three", "two", "one_general", "least", "late"],
)
def test_values_are_those_of_one_process(results: Results, name: str) -> None:
    alone = getattr(jobs, name)()
    assert all(r is not None and r.route == ROUTES.get(name, "kronecker") for r in alone.results)
    assert_same_noise(results[name], alone, ROUNDING)
    assert all(all(outcome.intact) for outcome in results[name])


def test_what_is_compared_is_not_one_number(results: Results) -> None:
    """Other parameters, other halves, other samples."""
    chains = [results[name][0].results[-1] for name in ("kronecker", "last_layer", "three", "two")]
    assert len({one.chain["hh"].norm for one in chains if one is not None}) == len(chains)
    variances = [results[name][0].results[-1] for name in ("kronecker", "last_layer", "general", "least", "late")]
    assert len({float(one.variances[0]) for one in variances if one is not None}) == len(variances)


def test_fewer_micro_batches_than_ranks(results: Results) -> None:
    """C and H are what they were; samples are paired within parts, of which both are told."""
    alone = jobs.one()
    for outcome in results["one"]:
        for found, expected in zip(outcome.results, alone.results, strict=True):
            assert found is not None
            assert expected is not None
            assert found.chain["hh"].norm != pytest.approx(expected.chain["hh"].norm, rel=1e-3)
            of_pairs = {"chain": {}, "weight_variance": 0.0, "unpaired": 0.0}
            assert_same_result(replace(found, **of_pairs), replace(expected, **of_pairs), ROUNDING)
    sentence = (
        "micro-batches must be at least as many as ranks for 'noise_awd_chain', got 1 for 2, which share them, so that "
        "samples are paired within parts: lower micro_batch_size."
    )
    assert sentence in results["one"][0].said
    assert sentence not in alone.said
    assert sentence not in results["two"][0].said


def test_streams(results: Results) -> None:
    """What each rank's loader gives is cut there: other pairs, the same matrices."""
    alone = jobs.kronecker()
    for outcome in results["streamed"]:
        found, expected = outcome.results[0], alone.results[0]
        assert found is not None
        assert expected is not None
        assert found.curvatures.tolist() == pytest.approx(expected.curvatures.tolist(), rel=1e-9, abs=1e-12)
        assert found.variances.tolist() == pytest.approx(expected.variances.tolist(), rel=1e-9, abs=1e-12)


def test_ways_that_differ_between_ranks(results: Results) -> None:
    assert_same_noise(results["unequal"], jobs.general(), ROUNDING)


def test_by_hand(results: dict[str, list[NoiseCurvature]]) -> None:
    alone = jobs.by_hand(0, 1)
    for found in results["by_hand"]:
        assert_same_result(found, alone, ROUNDING)


def test_training_is_the_same_to_the_bit(results: Results) -> None:
    for with_monitor, without in zip(results["disturbed"], results["undisturbed"], strict=True):
        assert with_monitor.rows
        assert not without.rows
        assert all(with_monitor.intact)
        assert_same_state(with_monitor, without)


def test_collectives(results: Results) -> None:
    """That all are ready, the sums with who has failed, and matrices; once more where there are single samples."""
    for name, count in (("kronecker", 3), ("last_layer", 3), ("two", 3), ("general", 4), ("forced", 4)):
        for outcome in results[name]:
            assert set(outcome.collectives) == {count}, name
    # The sums of one route in vain.
    assert set(results["late"][0].collectives) == {5}


@pytest.mark.parametrize("name", jobs.FAILING)
def test_a_failure_on_one_rank_is_nan_on_both(results: Results, name: str) -> None:
    case = getattr(jobs, name)
    for outcome, whole in zip(results[name], results["unbroken"], strict=True):
        assert set(outcome.rows) == {0, 1, 2, 3}
        for step, row in outcome.rows.items():
            assert math.isnan(row["noise_alignment"]) == (step == 1), (step, row)
        assert [result is None for result in outcome.results] == [False, True, False, False]
        assert all(outcome.intact)
        assert_same_state(outcome, whole)
    ends = [[text for text in outcome.said if "logs NaN" in text] for outcome in results[name]]
    assert ends[case.rank] == [f"Observed logs NaN: RuntimeError: {jobs.MESSAGE}"]
    (elsewhere,) = ends[1 - case.rank]
    assert elsewhere.endswith("failed on another rank; see that rank's log")


def test_errors_are_raised_on_both_ranks(results: dict[str, list[list[str]]]) -> None:
    by_rank = results["raised"]
    for number, name in enumerate(jobs.FAILING):
        rank = getattr(jobs, name).rank
        assert by_rank[rank][number] == f"RuntimeError: {jobs.MESSAGE}"
        assert by_rank[1 - rank][number].endswith("failed on another rank; see that rank's log")


def test_steps_that_communicate_are_refused(results: dict[str, list[Any]]) -> None:
    """A rank would wait for those that have other samples to evaluate."""
    for end, found in results["communication"]:
        assert end == (
            "MisconfigurationException: training_step must not communicate between ranks where single samples are "
            "measured, got c10d.allgather_.default: give objective= a callable that does without, or call evaluate() "
            "in one process."
        )
        assert found.results[0] is not None
