"""Two processes with sharded parameters (FSDP2) against one with the union of the data."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from tests.distributed import fsdp2_jobs as jobs
from tests.distributed.cases import BATCHES, Outcome
from tests.distributed.compare import assert_same_oscillation, assert_same_state, assert_same_values
from tests.helpers.processes import needs_fsdp2, run_on_ranks
from tests.helpers.runs import GROUPS

pytestmark = needs_fsdp2

Results = dict[str, list[Outcome]]


@pytest.fixture(scope="module")
def results() -> Any:
    """All runs of this file, by one pair of processes."""
    return run_on_ranks(jobs.__name__, [*jobs.JOBS, "refusal", "tensor_parallel", "interrupted"])


# Those with a head have a loss that is no likelihood of its outputs.
HEADED = ["headed", "headed_as_one", "headed_one_sided", "headed_accumulated"]


@pytest.mark.parametrize(
    "name", ["sgd", "adam", "as_one", "squared_error", "one_sided", "on_sides", "accumulated", *HEADED]
)
def test_values_are_those_of_the_union(results: Results, name: str) -> None:
    assert_same_values(results[name], getattr(jobs, name)(), torch.float64)


def test_parameters_are_in_shards(results: Results) -> None:
    # Three outputs over two processes: two rows and one. A single number: all of it and nothing.
    assert [len(outcome.state["network.2.weight"]) for outcome in results["sgd"]] == [2, 1]
    assert [outcome.state["network.2.bias"].numel() for outcome in results["squared_error"]] == [1, 0]


@pytest.mark.parametrize("name", ["sgd", "squared_error", "disturbed", "headed"])
def test_all_ranks_log_and_watch_the_same_numbers(results: Results, name: str) -> None:
    first, second = results[name]
    assert [row["train_loss"] for row in first.rows.values()] != [row["train_loss"] for row in second.rows.values()]
    for step, row in first.rows.items():
        own = {key: value for key, value in row.items() if key.startswith(GROUPS)}
        assert len(own) >= 8
        assert own == {key: second.rows[step][key] for key in own}
    assert first.metrics == second.metrics


@pytest.mark.parametrize(
    ("watched", "unwatched"),
    [
        ("disturbed", "undisturbed"),
        ("sgd", "sgd_unwatched"),
        ("as_one", "as_one_unwatched"),
        ("headed", "headed_unwatched"),
        ("penalized", "penalized_unwatched"),
    ],
)
def test_training_is_the_same_to_the_bit(results: Results, watched: str, unwatched: str) -> None:
    for with_monitor, without in zip(results[watched], results[unwatched], strict=True):
        assert len(with_monitor.rows) == BATCHES
        assert_same_state(with_monitor, without)


@pytest.mark.parametrize(
    ("watched", "unwatched", "units"),
    [("seldom", "seldom_unwatched", 2), ("seldom_deep", "seldom_deep_unwatched", 4)],
)
def test_nothing_is_gathered_but_by_the_forwards(results: Results, watched: str, unwatched: str, units: int) -> None:
    # Two reductions, and in each of the two forwards one gathering of each unit with parameters. A displacement, a
    # norm or a dot product over gathered parameters would add to it, and so would parameters gathered once too often
    # in the next step.
    for with_monitor, without in zip(results[watched], results[unwatched], strict=True):
        extra = [a - b for a, b in zip(with_monitor.collectives, without.collectives, strict=True)]
        # Once in a fit one more forward, which checks the step.
        assert extra == [2 + 3 * units, 0, 2 + 2 * units, 0]
        assert [a - b for a, b in zip(with_monitor.forwards, without.forwards, strict=True)] == [3, 0, 2, 0]


def test_the_oscillation_is_that_of_the_union(results: Results) -> None:
    alone, units = jobs.flipping(), 2
    assert_same_oscillation(results["flipping"], alone)
    flips = [row["curvature/oscillation_cosine"] < -0.9 for row in alone.rows.values()]
    for watched, plain in zip(results["flipping"], results["flipping_unwatched"], strict=True):
        assert_same_state(watched, plain)
        extra = [a - b for a, b in zip(watched.collectives, plain.collectives, strict=True)]
        # Two reductions, and the gatherings of the forwards: one of λ_KL, two more where the path flips.
        assert extra[1:] == [2 + units * (1 + 2 * flipped) for flipped in flips[1:]]


@pytest.mark.parametrize(("name", "units"), [("headed_seldom", 2), ("headed_seldom_deep", 4)])
def test_the_head_of_a_loss_gathers_nothing(results: Results, name: str, units: int) -> None:
    # Where it is cut off, once in a fit, two forwards more and an agreement.
    for with_monitor, without in zip(results[name], results[f"{name}_unwatched"], strict=True):
        extra = [a - b for a, b in zip(with_monitor.collectives, without.collectives, strict=True)]
        assert extra == [3 + 5 * units, 0, 2 + 2 * units, 0]
        assert [a - b for a, b in zip(with_monitor.forwards, without.forwards, strict=True)] == [5, 0, 2, 0]


def test_a_loss_that_reaches_parameters_in_shards_has_no_head(results: Results) -> None:
    for outcome in results["penalized"]:
        for row in outcome.rows.values():
            assert math.isnan(row["curvature/lambda_kl"])
            assert math.isfinite(row["curvature/lambda_fd"])


def test_derivatives_are_refused_in_one_sentence(results: dict[str, list[str]]) -> None:
    expected = (
        "estimators must be forward-only where parameters are sharded, got ['hvp', 'gauss_newton']: use 'kl', "
        "'finite_difference' or 'critical'."
    )
    assert results["refusal"] == [expected, expected]


def test_tensor_parallelism_is_refused_in_one_sentence(results: dict[str, list[list[str]]]) -> None:
    names = ("DirectionalCurvatureMonitor", "HessianSpectrumMonitor", "BatchSharpnessMonitor")
    shared = [
        f"strategy must give each rank batches of its own for {name}, got ModelParallelStrategy, whose 2 ranks share "
        "those of 1 (tensor parallelism): set tensor_parallel_size=1, or leave the monitor out."
        for name in names
    ]
    cut = [
        f"parameters must be whole, or sharded by FSDP2's fully_shard alone, for {name}, got 'network.0.weight' as a "
        "DTensor of another kind (tensor parallelism): leave its parallelization or the monitor out."
        for name in names
    ]
    assert results["tensor_parallel"] == [[*shared, *cut]] * 2


@pytest.mark.skipif(
    not hasattr(FSDPModule, "reset_iter_state"), reason="this version of torch cannot end an open forward"
)
def test_a_failed_forward_leaves_none_open(results: dict[str, list[dict[str, bool]]]) -> None:
    # On a GPU the next forward would not wait for the parameters to be put back.
    expected = {"within a forward": False, "in shards": True, "with gradients": True}
    assert results["interrupted"] == [expected, expected]
