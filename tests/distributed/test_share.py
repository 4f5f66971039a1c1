"""Work that ranks share out: each piece is done once, all get all results, and a failure is that of all."""

from __future__ import annotations

import pytest

from lightning_curvature.distributed.share import owners
from tests.distributed import share_jobs as jobs
from tests.helpers.processes import run_on_ranks


@pytest.mark.parametrize(
    ("costs", "ranks", "expected"),
    [
        ([4.0, 1.0, 1.0, 1.0, 1.0], 2, [0, 1, 1, 1, 1]),
        ([1.0, 1.0, 4.0], 2, [1, 1, 0]),
        ([1.0, 1.0], 3, [0, 1]),
        ([3.0, 2.0], 1, [0, 0]),
        ([], 2, []),
    ],
)
def test_the_costliest_comes_first_and_goes_to_the_idlest(costs: list[float], ranks: int, expected: list[int]) -> None:
    assert owners(costs, ranks) == expected


@pytest.mark.slow
def test_two_ranks_get_the_bits_of_one_with_one_collective() -> None:
    results = run_on_ranks(jobs.__name__, ["shared", "broken"])
    alone, made, count = jobs.shared()
    assert (made, count) == (["large", "small", "empty"], 0)
    for found, _, collectives in results["shared"]:
        assert found.keys() == alone.keys()
        assert all(found[name].equal(alone[name]) for name in alone)
        assert collectives == 1
    assert [made for _, made, _ in results["shared"]] == [["large"], ["small", "empty"]]
    assert results["broken"] == ["ValueError: broken", "RuntimeError: work failed on another rank; see that rank's log"]
