"""A loss of the outputs of all ranks: two processes have the values of one with the union, or NaN, and none waits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.distributed import gather_jobs as jobs
from tests.distributed.compare import assert_same_values
from tests.helpers.processes import run_on_ranks
from tests.oracles.along_step import DIFFERENCE


@pytest.fixture(scope="module")
def results() -> Any:
    """All runs of this file, by one pair of processes."""
    return run_on_ranks(jobs.__name__, jobs.JOBS)


@pytest.mark.parametrize("name", ["lightning", "functional"])
def test_values_are_those_of_the_union(results: Any, name: str) -> None:
    assert_same_values(results[name], getattr(jobs, name)(), torch.float64)


@pytest.mark.parametrize("name", ["pair", "alone"])
def test_the_distance_that_is_chosen_is_right_on_ranks_too(results: Any, name: str) -> None:
    expected = getattr(jobs, name)()
    for outcome in results[name]:
        for step, row in expected.rows.items():
            for key in ("lambda_kl", "lambda_fd"):
                if (full := f"curvature/{key}") in row:
                    assert outcome.rows[step][full] == pytest.approx(row[full], rel=DIFFERENCE)
                    assert outcome.rows[step][f"curvature_diagnostics/{key}_error"] < 1e-3


def test_forward_mode_does_not_pass_a_collective(results: Any) -> None:
    """It costs λ_GN, and no other value."""
    expected = jobs.forward_mode()
    for outcome in results["forward_mode"]:
        for step, row in expected.rows.items():
            assert math.isnan(outcome.rows[step]["curvature/lambda_gn"])
            assert outcome.rows[step]["curvature/lambda_dir"] == pytest.approx(row["curvature/lambda_dir"], rel=1e-10)
