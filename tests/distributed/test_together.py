"""Ranks add numbers and learn who failed, by one all-reduce for both."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_curvature.distributed.together import attempt_together, cause_together, means_together, together
from tests.distributed import together_jobs as jobs
from tests.helpers.processes import run_on_ranks

Results = dict[str, list[Any]]
HERE, THERE = "RuntimeError: out of memory", "RuntimeError: adding failed on another rank; see that rank's log"


@pytest.fixture(scope="module")
def results() -> Any:
    """All jobs of this file, by one pair of processes."""
    return run_on_ranks(jobs.__name__, jobs.JOBS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_in_their_own_type_by_one_collective(results: Results, dtype: torch.dtype) -> None:
    expected = {name: jobs.parts(0, dtype)[name] + jobs.parts(1, dtype)[name] for name in ("a", "b")}
    for found in results["sums"]:
        # Sums of two small numbers with few digits are exact.
        assert all(torch.equal(found[str(dtype)][name], expected[name]) for name in expected)
        assert found[str(dtype)]["a"].dtype == dtype
        assert found[f"{dtype} collectives"] == 1


def test_each_rank_reads_again_where_it_read_first(results: Results) -> None:
    for rank, (positions, found, counts) in enumerate(results["positions"]):
        assert positions == [{"dataset.rank": 0, "dataset.epoch": 1}, {"dataset.rank": 1, "dataset.epoch": 1}]
        assert found == [[100 * rank + 10 + number for number in range(4)]] * 2
        assert counts == [(1, 1), (1, 0)]


def test_the_rank_that_failed_has_its_error_and_the_other_one_says_so(results: Results) -> None:
    assert results["one_fails"] == [(THERE, 1, False), (HERE, 1, False)]


def test_a_mistake_is_a_mistake_on_all_ranks(results: Results) -> None:
    mistake = "MisconfigurationException: outputs must have a name"
    assert results["one_is_mistaken"] == [(mistake, 1, False), (THERE.replace("RuntimeError", mistake[:25]), 1, False)]


def test_each_of_two_failures_stays_where_it_was(results: Results) -> None:
    # The second may be a lack of second derivatives: both ranks learn of it.
    assert results["both_fail"] == [("RuntimeError: first", 2, True), ("NotImplementedError: second", 2, True)]


def test_a_number_that_is_not_finite_is_no_failure(results: Results) -> None:
    for found in results["a_sum_that_is_not_finite"]:
        assert found.isnan().tolist() == [True, False]
        assert found[1] == 2.0


def test_means_and_a_name_that_one_rank_leaves_out(results: Results) -> None:
    for found in results["means"]:
        assert found["x"] == 1.5
        assert found["y"] != found["y"]


def test_causes_of_a_product_that_is_not_finite(results: Results) -> None:
    loss = "ArithmeticError: a product must be finite"
    there = "RuntimeError: a product failed on another rank; see that rank's log"
    assert results["causes"] == [["RuntimeError: here", loss], [there, loss]]
    assert results["goes_on"] == [3, 3]


def test_every_rank_gets_the_smallest_capacity_of_each_name(results: Results) -> None:
    assert results["capacities"] == [("inputs", {"vectors": 3.0, "route": 0.0})] * 2
    there = "preparing the measurement failed on another rank; see that rank's log"
    assert results["preparing_fails"] == [there, "out of memory"]


def test_one_process_adds_nothing_and_raises_its_own_error() -> None:
    alone, error = jobs.trainer(0, 1), ArithmeticError("a product must be finite")

    def fail() -> dict[str, Tensor]:
        raise MisconfigurationException("outputs must have a name")

    assert together(alone, lambda: jobs.parts(0), {}, "adding").keys() == {"a", "b"}
    assert means_together(alone, lambda: {"x": torch.tensor(2)}, ("x",), "averaging") == {"x": 2.0}
    with pytest.raises(MisconfigurationException, match="outputs must have a name"):
        together(alone, fail, {}, "adding")
    assert attempt_together(alone, fail, {"a": torch.ones(1)}, "adding").sums == {"a": torch.ones(1)}
    assert cause_together(alone, None, error) is error


def test_errors_let_go_of_what_their_frames_held() -> None:
    graphs: list[weakref.ref[nn.Module]] = []

    def fail() -> dict[str, Tensor]:
        held = nn.Linear(1, 1)
        graphs.append(weakref.ref(held))
        raise RuntimeError("out of memory")

    gc.disable()  # by reference counts alone: no cycle keeps it either
    try:
        outcome = attempt_together(jobs.trainer(0, 1), fail, {}, "adding")
        assert outcome.error is not None
        assert graphs[0]() is None
    finally:
        gc.enable()
