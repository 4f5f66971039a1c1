"""Two processes under DDP against one with the union of the data."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed import ddp_jobs as jobs
from tests.distributed.cases import Outcome
from tests.distributed.compare import assert_same_oscillation, assert_same_state, assert_same_values
from tests.helpers.processes import run_on_ranks
from tests.helpers.runs import GROUPS

Results = dict[str, list[Outcome]]


@pytest.fixture(scope="module")
def results() -> Any:
    """All runs of this file, by one pair of processes."""
    return run_on_ranks(jobs.__name__, jobs.JOBS)


@pytest.mark.parametrize(
    "name",
    [
        "sgd_64",
        "adamw_64",
        "squared_error",
        "accumulated",
        "unused",
        "rare",
        "uneven",
        "by_head",
        "by_head_accumulated",
        "on_sides",
        "on_sides_accumulated",
        "on_sides_repeated",
    ],
)
def test_values_are_those_of_the_union_in_float64(results: Results, name: str) -> None:
    assert_same_values(results[name], getattr(jobs, name)(), torch.float64)


@pytest.mark.parametrize("name", ["sgd_32", "adamw_32"])
def test_values_are_those_of_the_union_in_float32(results: Results, name: str) -> None:
    assert_same_values(results[name], getattr(jobs, name)(), torch.float32)


def test_accumulation_measures_whole_windows(results: Results) -> None:
    # Windows of two batches, two and the one that is left.
    assert list(results["accumulated"][0].rows) == [0, 1, 2]
    assert [len(metrics) > 0 for metrics in results["accumulated"][0].metrics] == [False, True, True, True, True]


def test_unused_layer_stays_out(results: Results) -> None:
    assert_same_values(results["unused"], jobs.sgd_64(), torch.float64)


@pytest.mark.parametrize("name", ["sgd_64", "adamw_32", "adapted", "rare", "disturbed"])
def test_all_ranks_log_and_watch_the_same_numbers(results: Results, name: str) -> None:
    first, second = results[name]
    # The losses of the halves differ, so that equal numbers are no accident.
    assert [row["train_loss"] for row in first.rows.values()] != [row["train_loss"] for row in second.rows.values()]
    for step, row in first.rows.items():
        own = {key: value for key, value in row.items() if key.startswith(GROUPS)}
        assert len(own) >= 8
        assert own == {key: second.rows[step][key] for key in own}
    assert first.metrics == second.metrics
    assert all(metrics["curvature/headroom"] > 0.0 for metrics in first.metrics)


def test_early_stopping_on_headroom_decides_alike(results: Results) -> None:
    alone = jobs.stopped()
    assert 0 < alone.global_step < jobs.EPOCHS * jobs.BATCHES
    assert [outcome.global_step for outcome in results["stopped"]] == [alone.global_step] * 2


def test_training_is_the_same_to_the_bit(results: Results) -> None:
    for watched, alone in zip(results["disturbed"], results["undisturbed"], strict=True):
        assert len(watched.rows) == jobs.BATCHES
        assert_same_state(watched, alone)
    for watched, alone in zip(results["seldom_deep"], results["unwatched_deep"], strict=True):
        assert_same_state(watched, alone)


def extra(results: Results, watched: str, unwatched: str) -> list[int]:
    """Collectives of each batch beyond those of training itself."""
    counts = [[a - b for a, b in zip(*pair, strict=True)] for pair in _collectives(results, watched, unwatched)]
    assert counts[0] == counts[1]
    return counts[0]


def _collectives(results: Results, watched: str, unwatched: str) -> list[tuple[list[int], list[int]]]:
    return [(a.collectives, b.collectives) for a, b in zip(results[watched], results[unwatched], strict=True)]


@pytest.mark.parametrize(
    ("watched", "unwatched"),
    [
        ("seldom", "unwatched"),
        ("exact", "unwatched"),
        ("exact_by_module", "unwatched"),
        ("seldom_deep", "unwatched_deep"),
    ],
)
def test_a_measured_step_takes_two_reductions(results: Results, watched: str, unwatched: str) -> None:
    assert extra(results, watched, unwatched) == [2 * measured for measured in jobs.MEASURED]


@pytest.mark.parametrize("name", ["flipping", "flipping_exact"])
def test_the_oscillation_is_that_of_the_union(results: Results, name: str) -> None:
    alone = getattr(jobs, name)()
    assert_same_oscillation(results[name], alone)
    assert extra(results, name, "flipping_unwatched") == [2] * len(alone.rows)
    for watched, plain in zip(results[name], results["flipping_unwatched"], strict=True):
        assert_same_state(watched, plain)


def test_the_search_takes_one_reduction_a_forward(results: Results) -> None:
    forwards = [count - 1 for count in results["searching"][0].forwards]
    forwards[0] -= 1  # the step is checked, by itself
    assert [count > 2 for count in forwards] == jobs.MEASURED
    assert extra(results, "searching", "unwatched") == [
        (1 + count) * measured for count, measured in zip(forwards, jobs.MEASURED, strict=True)
    ]
