"""Names of logged values: groups of values, of diagnostics and of shares of the edge."""

from __future__ import annotations

import math

import pytest

from lightning_curvature.reporting.names import by_module, full_name, over_edge, values_over_edge
from lightning_curvature.reporting.tables import values_table


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("lambda_kl", "curvature/lambda_kl"),
        ("lambda_kl_error", "curvature_diagnostics/lambda_kl_error"),
        ("lambda_max_converged", "curvature_diagnostics/lambda_max_converged"),
        ("lambda_max_upper", "curvature_diagnostics/lambda_max_upper"),
        ("lambda_max_threshold", "curvature/lambda_max_threshold"),
        ("batch_sharpness_batches", "curvature_diagnostics/batch_sharpness_batches"),
        ("batch_sharpness_stderr", "curvature_diagnostics/batch_sharpness_stderr"),
        ("epsilon", "curvature_diagnostics/epsilon"),
        ("two_over_lr", "curvature/two_over_lr"),
    ],
)
def test_values_and_diagnostics_have_groups_of_their_own(key: str, name: str) -> None:
    assert full_name("curvature", key) == name


def test_a_group_is_what_stands_before_the_first_slash() -> None:
    """TensorBoard's rule, also where a prefix has slashes itself."""
    assert full_name("c/d", "epsilon") == "c_diagnostics/d/epsilon"
    assert over_edge("c/d", "lambda_kl") == "c_over_edge/d/lambda_kl"
    assert (by_module("c/d"), by_module("c")) == ("c_by_module/d", "c_by_module")


def test_values_over_their_edges() -> None:
    values = {"lambda_kl": 3.0, "lambda_fd": math.nan, "two_over_lr": 4.0, "stability_index": 0.5}
    edges = {"lambda_kl": "two_over_lr", "lambda_fd": "two_over_lr", "stability_index": None, "absent": "two_over_lr"}
    found = values_over_edge("c", values, edges)
    assert math.isnan(found.pop("c_over_edge/lambda_fd"))
    assert found == {"c_over_edge/lambda_kl": 0.75, "c_over_edge/stability_index": 0.5, "c_over_edge/edge": 1.0}


def test_a_learning_rate_of_zero_has_an_infinite_edge_and_no_edge_has_no_line() -> None:
    values = {"lambda_kl": 3.0, "two_over_lr": math.inf, "lambda_max": 2.0}
    found = values_over_edge("c", values, {"lambda_kl": "two_over_lr", "lambda_max": "lambda_max_threshold"})
    assert found == {"c_over_edge/lambda_kl": 0.0, "c_over_edge/edge": 1.0}
    assert values_over_edge("c", values, {"lambda_max": "lambda_max_threshold"}) == {}


def test_a_table_has_errors_beside_their_values() -> None:
    values = {"delta": 2.0, "delta_stderr": 0.125, "gamma": math.nan, "sigma_steps": 3.0}
    assert values_table(values, {"gamma": "too few"}).splitlines() == [
        "| key | value | standard error | why NaN |",
        "|---|---|---|---|",
        "| `delta` | 2 | 0.12 |  |",
        "| `gamma` | nan |  | too few |",
        "| `sigma_steps` | 3 |  |  |",
    ]
