"""The result of a measurement: its values are those that are logged, and it says why a value is NaN."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_curvature import DirectionalCurvatureMonitor
from lightning_curvature.directional.result import DirectionalResult
from tests.helpers.runs import Classifier, Outcome, classification, mlp, own, run

ALL = ("hvp", "gauss_newton", "kl", "finite_difference", "critical")


def measured(module: Classifier | None = None, steps: int = 1, **options: Any) -> tuple[DirectionalResult, Outcome]:
    module = module or Classifier(mlp(4, 6, 3), lambda m: torch.optim.SGD(m.parameters(), lr=0.3))
    monitor = DirectionalCurvatureMonitor(**({"estimators": ALL, "every_n_train_steps": 1} | options))
    assert monitor.result is None
    outcome = run(module, classification(steps), monitor)
    assert monitor.result is not None
    return monitor.result, outcome


def test_values_are_those_that_are_logged() -> None:
    result, outcome = measured()
    logged = own(outcome.capture.rows[0])
    assert result.values() == logged
    assert result.reasons == {}
    with pytest.raises(FrozenInstanceError):
        result.descent = 1.0  # type: ignore[misc]


@pytest.mark.filterwarnings("ignore:DirectionalCurvatureMonitor logs NaN")
def test_failed_exact_products_leave_the_other_values() -> None:
    class Failing(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if torch.autograd.forward_ad._current_level >= 0:
                raise NotImplementedError("no forward mode")
            return super().training_step(batch, batch_idx)

    result, _ = measured(Failing(mlp(4, 6, 3), lambda m: torch.optim.SGD(m.parameters(), lr=0.3)))
    values = result.values()
    sentence = "lambda_gn needs forward-mode derivatives of the step, which failed (no forward mode): take 'kl' for"
    assert dict(result.reasons) == {"lambda_gn": f"{sentence} 'gauss_newton'."}
    assert {key for key, value in values.items() if math.isnan(value)} == {"lambda_gn", "lambda_gn_error"}
    assert values["headroom"] == pytest.approx(values["two_over_lr"] / values["lambda_dir"], rel=1e-12)  # of roundings


@pytest.mark.filterwarnings("ignore:the step did not move")
def test_a_step_without_a_learning_rate_has_no_unit() -> None:
    still = Classifier(mlp(4, 6, 3), lambda m: torch.optim.SGD(m.parameters(), lr=0.0))
    result, _ = measured(still)
    values = result.values()
    assert values.pop("two_over_lr") == math.inf
    assert all(math.isnan(value) for value in values.values())
    assert set(result.reasons) == {"lambda_dir", "lambda_gn", "lambda_kl", "lambda_fd", "critical_sharpness"}
    assert "did not move the parameters" in result.reasons["lambda_kl"]


@pytest.mark.filterwarnings("ignore:the search for the critical step")
def test_a_search_without_a_bracket_says_so() -> None:
    result, _ = measured(estimators=("critical",), critical_max_forwards=3)
    assert dict(result.reasons) == {"critical_sharpness": "critical_max_forwards came before the search had a bracket"}
    assert math.isnan(result.values()["critical_sharpness"])
