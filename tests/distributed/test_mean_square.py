"""The stability index of two ranks against one process that accumulates their batches."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed import mean_square_jobs as jobs
from tests.distributed.mean_square_jobs import Outcome
from tests.helpers.processes import needs_fsdp2, run_on_ranks

Results = dict[str, list[Outcome]]


@pytest.fixture(scope="module")
def results() -> Any:
    return run_on_ranks(jobs.__name__, [name for name in jobs.JOBS if not name.startswith("sharded")])


@pytest.fixture(scope="module")
def in_shards() -> Any:
    return run_on_ranks(jobs.__name__, [name for name in jobs.JOBS if name.startswith("sharded")])


def same(together: Outcome, alone: Outcome, tolerance: float) -> None:
    assert together.result is not None
    assert alone.result is not None
    assert len(together.result.steps) == len(alone.result.steps) == jobs.STEPS - 2
    for one, other in zip(together.result.steps, alone.result.steps, strict=True):
        for name in ("drift", "noise", "variance", "form"):
            size = abs(other.drift) + other.variance + abs(other.form)
            assert getattr(one, name) == pytest.approx(getattr(other, name), rel=0.0, abs=tolerance * size), name


@pytest.mark.parametrize("name", ["whole", "preconditioned"])
def test_the_halves_of_two_ranks_are_their_batches(results: Results, name: str) -> None:
    """Sums in another order, over fourteen steps of training: hundreds of roundings in float64."""
    alone = getattr(jobs, name)()
    for outcome in results[name]:
        same(outcome, alone, 1e-10)
        assert outcome.rows.keys() == alone.rows.keys()
        last = outcome.rows[jobs.STEPS - 1]["stability_index"]
        assert last == pytest.approx(alone.rows[jobs.STEPS - 1]["stability_index"], rel=1e-8)
    assert str(results[name][0].rows) == str(results[name][1].rows)  # NaN differs from itself


def test_a_measured_step_takes_two_reductions(results: Results) -> None:
    """That all are ready, and the products; nothing on other steps, and nothing before the average is formed."""
    for watched, plain in zip(results["seldom"], results["seldom_unwatched"], strict=True):
        extra = [a - b for a, b in zip(watched.collectives, plain.collectives, strict=True)]
        assert extra == [2 * (step % 2 == 0 and step >= 2) for step in range(jobs.STEPS)]
        for name, value in watched.state.items():
            assert value.equal(plain.state[name]), name


@needs_fsdp2
@pytest.mark.filterwarnings("ignore:products with the Hessian are made by a difference")
def test_shards(in_shards: Results) -> None:
    """Each rank halves its own batch: another split of the same data, whose mean is the same."""
    alone = jobs.sharded()
    for watched, plain in zip(in_shards["sharded"], in_shards["sharded_unwatched"], strict=True):
        assert watched.result is not None
        assert alone.result is not None
        # The product with all of the data, by differences of gradients: to the square root of a rounding.
        assert [one.form for one in watched.result.steps] == pytest.approx(
            [one.form for one in alone.result.steps], rel=1e-5
        )
        assert all(one.variance > 0.0 for one in watched.result.steps)
        for name, value in watched.state.items():
            assert value.equal(plain.state[name]), name
