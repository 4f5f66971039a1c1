"""Curves come into their groups by name, whatever the prefix, and from logs older than the groups, too."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lightning_curvature.report.series import all_series, in_order, prefixes, series_of, symbol
from lightning_curvature.reporting.names import by_module, full_name, over_edge
from tests.helpers.logged import run_of

PREFIXES = ("curvature", "left", "game/left", "a_diagnostics")


@pytest.mark.parametrize("prefix", PREFIXES)
def test_groups_of_any_prefix(prefix: str) -> None:
    run = run_of(
        {
            full_name(prefix, "lambda_max"): [2.0, -4.0],
            full_name(prefix, "lambda_max_error"): [0.1, 0.2],
            full_name(prefix, "hessian_trace"): [5.0, 6.0],
            full_name(prefix, "hessian_trace_stderr"): [0.5, math.nan],
            over_edge(prefix, "lambda_max"): [0.5, -1.0],
            over_edge(prefix, "edge"): [1.0, 1.0],
            f"{by_module(prefix)}/hessian_trace/a.0": [3.0, 3.0],
            f"{by_module(prefix)}/hessian_trace_stderr/a.0": [0.25, 0.5],
            f"other/{prefix}/lambda_max": [9.0, 9.0],
            f"{prefix}/deeper/lambda_dir": [9.0, 9.0],
            "val/loss": [1.0, 2.0],
            "lossless": [1.0, 2.0],
        }
    )
    one = series_of(run, prefix)
    assert list(one.values) == ["lambda_max", "hessian_trace"]
    assert one.values["lambda_max"].errors == pytest.approx([0.2, 0.8])  # relative
    np.testing.assert_equal(one.values["hessian_trace"].errors, [0.5, math.nan])  # in units of the value
    assert set(one.diagnostics) == {"lambda_max_error", "hessian_trace_stderr"}
    assert one.shares["lambda_max"].values.tolist() == [0.5, -1.0]
    assert one.shares["lambda_max"].errors == pytest.approx([0.05, 0.2])
    assert one.modules["hessian_trace"]["a.0"].errors.tolist() == [0.25, 0.5]  # type: ignore[union-attr]
    assert list(one.losses) == ["val/loss"]


def test_logs_older_than_the_groups() -> None:
    """Diagnostics stood beside the values, and there were no shares."""
    old = {
        "curvature/lambda_max": [1.0, 2.0, 3.0],
        "curvature/lambda_max_error": [0.1, 0.1, 0.1],
        "curvature/lambda_max_threshold": [2.0, 2.0, 0.0],
        "curvature/stability_index": [0.5, 0.6, 0.7],
        "curvature/batch_sharpness": [1.0, 1.0, 1.0],
        "curvature/two_over_lr": [2.0, 2.0, 2.0],
    }
    one = series_of(run_of(old), "curvature")
    assert set(one.diagnostics) == {"lambda_max_error"}
    assert one.shares["lambda_max"].values.tolist() == [0.5, 1.0, math.inf]
    assert one.shares["lambda_max"].errors is not None
    assert one.shares["lambda_max"].errors[:2] == pytest.approx([0.05, 0.1])
    assert one.shares["stability_index"].values.tolist() == [0.5, 0.6, 0.7]
    # The edge of batch sharpness depends on the optimizer, which the logs do not name.
    assert "batch_sharpness" not in one.shares


def test_shares_follow_an_edge_that_is_logged_at_other_steps() -> None:
    run = run_of({"curvature/lambda_dir": [1.0, 2.0, 3.0], "curvature/two_over_lr": [2.0]})
    np.testing.assert_equal(series_of(run, "curvature").shares["lambda_dir"].values, [0.5, math.nan, math.nan])


def test_the_order_of_keys_and_their_symbols() -> None:
    keys = ["two_over_lr", "lambda_10", "lambda_2", "lambda_dir", "new_key", "lambda_max", "edge_ratio"]
    assert in_order(keys) == [
        "edge_ratio",
        "lambda_max",
        "lambda_2",
        "lambda_10",
        "lambda_dir",
        "two_over_lr",
        "new_key",
    ]
    assert [symbol(key) for key in ("lambda_10", "lambda_fd", "train_loss")] == ["λ_10", "λ_FD", "train_loss"]


def test_a_wrong_prefix_names_those_that_were_logged() -> None:
    runs = [run_of({"left/lambda_dir": [1.0], "left_over_edge/lambda_dir": [1.0], "game/right/gni": [1.0]})]
    assert prefixes(runs) == ["game/right", "left"]
    with pytest.raises(ValueError, match="--prefix must be one of the logged values, got 'x': try game/right or left"):
        all_series(runs, "x")
    with pytest.raises(
        ValueError, match="DIR must hold values of a monitor, got none in its logs: add a monitor to the"
    ):
        all_series([run_of({"train_loss": [1.0]})], "curvature")
