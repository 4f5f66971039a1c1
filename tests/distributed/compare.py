"""What two processes must agree on with one, to which digits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from tests.distributed.cases import EPSILON, Outcome

SMOOTH = ("lambda_dir", "lambda_gn", "lambda_kl", "descent", "update_norm")
STEPWISE = ("critical_sharpness", "critical_sharpness_error", "two_over_lr", "epsilon")


def assert_same_values(together: Sequence[Outcome], alone: Outcome, dtype: torch.dtype) -> None:
    """Every curvature of every step is that of one process with the union of the data."""
    for outcome in together:
        assert outcome.rows.keys() == alone.rows.keys()
        for step, expected in alone.rows.items():
            _assert_same_row(outcome.rows[step], expected, dtype)


def _assert_same_row(row: dict[str, float], expected: dict[str, float], dtype: torch.dtype) -> None:
    # Sums of products over a few hundred terms in another order, and four steps of training in which the difference
    # can grow: hundreds of roundings. Measured: 1e-15 and 2e-7.
    smooth = {torch.float64: 1e-10, torch.float32: 1e-5}[dtype]
    measured = {
        key.rpartition("/")[2]: key for key in expected if key.startswith(("curvature/", "curvature_diagnostics/"))
    }
    for name in [*SMOOTH, "lambda_fd"]:
        if name in measured:
            tolerance = second_difference_tolerance(expected, dtype) if name == "lambda_fd" else smooth
            assert row[measured[name]] == pytest.approx(expected[measured[name]], rel=tolerance), name
            assert math.isfinite(expected[measured[name]]), name
    for key in expected:
        if key.startswith("curvature_by_module/"):
            size = abs(expected[measured["lambda_dir" if "/lambda_dir/" in key else "descent"]])
            assert row[key] == pytest.approx(expected[key], rel=0.0, abs=smooth * size), key
    # Decisions on the sign of a difference, and constants: the same to the last digit, unless a trial length of the
    # search has the loss of the start itself.
    for name in STEPWISE:
        if name in measured:
            assert row[measured[name]] == pytest.approx(expected[measured[name]], rel=4 * torch.finfo(dtype).eps), name


def assert_same_oscillation(together: Sequence[Outcome], alone: Outcome) -> None:
    """The oscillation of every step is that of one process with the union of the data, in float64."""
    flips = [row["curvature/oscillation_cosine"] < -0.9 for row in alone.rows.values()]
    assert 2 <= sum(flips) < len(flips)
    for outcome in together:
        assert outcome.rows.keys() == alone.rows.keys()
        for step, expected in alone.rows.items():
            row = outcome.rows[step]
            # A rounding, and the path beyond the edge multiplies what differs by two or so at each of its steps.
            for name in ("oscillation_cosine", "oscillation_growth", "oscillation_edge"):
                assert row[f"curvature/{name}"] == pytest.approx(expected[f"curvature/{name}"], rel=1e-9, nan_ok=True)
            # A pair of losses has seven digits where rounding and truncation meet.
            key = "curvature/lambda_osc"
            assert row[key] == pytest.approx(expected[key], rel=1e-5, nan_ok=True)
        assert [math.isfinite(row["curvature/lambda_osc"]) for row in outcome.rows.values()] == flips


def second_difference_tolerance(row: dict[str, float], dtype: torch.dtype) -> float:
    """Relative difference that the rounding of three losses makes in their second difference.

    A loss of mean L carries a rounding of about u(1 + L), three of them with weights 1, 2, 1 one of √6 times as much,
    in either run √2 times again; four deviations. Against it stands ε²dᵀHd.
    """
    lr = 2.0 / row["curvature/two_over_lr"]
    quadratic = row["curvature/lambda_fd"] * row["curvature/descent"] * lr**2
    unit = torch.finfo(dtype).eps / 2.0
    tolerance = 4.0 * math.sqrt(12.0) * unit * (1.0 + row["train_loss"]) / (EPSILON**2 * quadratic)
    # Must stay a test: a wrong number of shards or ranks is a factor of two.
    assert tolerance < {torch.float64: 1e-10, torch.float32: 1e-2}[dtype]
    return tolerance


def assert_same_state(a: Outcome, b: Outcome) -> None:
    """Weights, buffers, optimizer state and random numbers are the same to the last bit."""
    assert a.state.keys() == b.state.keys()
    for name, value in a.state.items():
        assert torch.equal(value, b.state[name]), name
