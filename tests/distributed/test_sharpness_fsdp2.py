"""Mini-batch sharpness of sharded parameters (FSDP2): differences of gradients, against exact products elsewhere."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_curvature.batch_sharpness.options import QUANTITIES
from tests.distributed import sharpness_fsdp2_jobs as jobs
from tests.distributed.compare import assert_same_state
from tests.distributed.sharpness_cases import assert_complete, assert_same_sharpness, lost, same_text
from tests.distributed.sharpness_jobs import Results
from tests.helpers.processes import needs_fsdp2, run_on_ranks

pytestmark = [needs_fsdp2, pytest.mark.slow]

TOLD = (
    "products with the Hessian are made by a difference of gradients, since parameters are sharded and second "
    "derivatives do not reach through their gathering."
)


@pytest.fixture(scope="module")
def results() -> Any:
    """All runs of this file, by one pair of processes."""
    return run_on_ranks(jobs.__name__, [*jobs.JOBS, "foretold", "refused"])


# A difference is within 3e-10 of a product in float64, within 2e-4 in float32 (see operators/differences.py); where
# curvatures of both signs are summed it counts for more. Measured: 2e-10, 2e-5.
@pytest.mark.parametrize("name", jobs.COMPARED)
def test_values_are_those_of_exact_products_on_one_process(results: Results, name: str) -> None:
    alone = getattr(jobs, name)()
    assert_complete(alone)
    assert_same_sharpness(results[name], alone, 1e-3 if name == "sharded_32" else 1e-6)
    assert same_text(*results[name])


def test_what_is_compared_is_not_one_number(results: Results) -> None:
    rows = {name: results[name][0].rows[0] for name in ("uneven", "ragged", "single")}
    assert set(QUANTITIES) <= rows["uneven"].keys()
    for key in jobs.CHEAP:
        values = [row[key] for row in rows.values()]
        assert min(abs(a / b - 1.0) for a, b in zip(values, [*values[1:], values[0]], strict=True)) > 1e-3, key
    # Another clipping, other updates; the batches of each rank, and not one of them twice.
    assert abs(results["clipped"][0].rows[0]["lambda_gen"] / rows["uneven"]["lambda_gen"] - 1.0) > 0.1
    assert results["by_rank"][0].rows[0]["batch_sharpness_stderr"] < 1e-8


def test_parameters_are_in_uneven_shards(results: Results) -> None:
    def sizes(name: str, key: str) -> list[int]:
        return [len(outcome.state[key]) for outcome in results[name]]

    assert sizes("uneven", "network.0.weight") == [3, 2]
    assert sizes("one_output", "network.2.weight") == sizes("one_output", "network.2.bias") == [1, 0]


@pytest.mark.parametrize(
    ("watched", "unwatched"),
    [
        ("uneven", "uneven_unwatched"),
        ("as_one", "as_one_unwatched"),
        ("disturbed", "undisturbed"),
    ],
)
def test_training_is_the_same_to_the_bit(results: Results, watched: str, unwatched: str) -> None:
    for with_monitor, without in zip(results[watched], results[unwatched], strict=True):
        assert len(with_monitor.rows) == 2
        assert not without.rows
        assert_complete(with_monitor)
        assert_same_state(with_monitor, without)


@pytest.mark.parametrize("name", [*jobs.COMPARED, "disturbed"])
def test_shards_come_back_bit_for_bit(results: Results, name: str) -> None:
    """State before and after each measurement, on each rank."""
    for outcome in results[name]:
        assert outcome.rows
        assert all(outcome.intact)


@pytest.mark.parametrize("name", ["uneven", "sharded_32"])
def test_the_choice_is_told_once(results: Results, name: str) -> None:
    assert [outcome.said for outcome in results[name]] == [[TOLD], []]


# One collective to be ready, one to know how many parameters there are, one for each pair of mini-batches. A gradient
# is a pass, and its norm a collective; a product is two passes, the norms of θ and of its vector, and a dot product.
# The norm of a vector of another mini-batch is taken once more; that of θ is known after a mini-batch's first product.
# ∇L takes three passes, two norms, and a collective for the collating; λ_gen two dot products with it for each pair.
@pytest.mark.parametrize(
    ("name", "passes", "others"),
    [
        ("own", 4 * 3, 2 + 2 + 4 * 4),
        ("crossed", 4 * 3, 2 + 2 + 4 * 5),
        ("full", 3 + 4 * 5, 2 + 3 + 2 + 4 * (2 + 2 * 3) + 4),
        ("step", 3, 2 + 4),
    ],
)
def test_nothing_is_gathered_but_by_the_passes(results: Results, name: str, passes: int, others: int) -> None:
    """Whatever the number of parameters."""
    for depth, units in (("", 2), ("_deep", 5)):
        for outcome in results[f"counted_{name}{depth}"]:
            # Each unit is gathered for the forward and for the backward, and its gradient is shared out.
            # Where something is read, the reading is agreed on.
            # The step is checked by one forward more, whose gathered parameters are let go of afterwards.
            # Before the first product seven measure the distance, two passes and 12 norms, and one forward looks for
            # kinks, of which ranks agree that there are none.
            once = (name != "step") + units + 1 + (7 * 2 * 3 * units + 12) + (units + 1)
            assert outcome.collectives == [passes * 3 * units + others + once]


def test_the_update_of_a_step_is_foretold(results: dict[str, list[list[list[bool]]]]) -> None:
    """To the bit, by a copy of the optimizer on copies of the shards."""
    assert results["foretold"] == [[[True, True]] * 3] * 2


@pytest.mark.parametrize("name", jobs.FAILING)
def test_a_failure_costs_one_measurement(results: Results, name: str) -> None:
    """On one rank before its first forward, or on all of them in the midst of one."""
    for outcome, whole in zip(results[name], results["unbroken"], strict=True):
        gone = lost(outcome.rows[1])
        # ∇L is measured by itself.
        kept = {"batch_sharpness"} if name == "in_full_gradient" else set()
        assert {"batch_sharpness", "gni"} - gone == kept
        for step in (0, 2):
            assert repr(outcome.rows[step]) == repr(whole.rows[step])
        assert all(outcome.intact)
        assert_same_state(outcome, whole)
    first, second = (outcome.said for outcome in results[name])
    own = f"Observed logs NaN: RuntimeError: {jobs.MESSAGE}"
    assert second == [own]
    assert first[0] == TOLD
    assert first[1:] == [own] or first[1].endswith("failed on another rank; see that rank's log")


def test_what_differences_cannot_do_is_refused(results: dict[str, list[list[str]]]) -> None:
    expected = [
        "curvature must be 'hessian' where parameters are sharded, got 'gauss_newton': exact products do not reach "
        "through their gathering.",
        "batches_at_once must be 'auto' or 1 where parameters are sharded, got 8: all ranks gather them for one "
        "mini-batch after the other.",
        "a mini-batch must take as many batches of each rank where parameters are sharded and the dataset has no "
        "indices, got 1 for 2 ranks: choose another batch_size or micro_batch_size, or give probe_dataloader= over a "
        "dataset with indices.",
    ]
    assert results["refused"] == [expected, expected]
