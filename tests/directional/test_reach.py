"""How far a step could have gone (the critical step), how far it went (tiny to huge), and how often it is measured."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lightning_curvature import DirectionalCurvatureMonitor
from tests.helpers.runs import Classifier, Outcome, classification, mlp, run
from tests.oracles.along_step import ALL, DIFFERENCE, EXACT, first_crossing, monitors, rows_of
from tests.oracles.dense import loss_along


def fit(lr: float, *callbacks: Any, batches: int = 1, momentum: float = 0.0, **options: Any) -> Outcome:
    module = Classifier(mlp(4, 6, 3), lambda m: torch.optim.SGD(m.parameters(), lr=lr, momentum=momentum))
    return run(module, classification(batches), *callbacks, **options)


# Far within the edge, where the search doubles; near it; and well past it, where it halves.
@pytest.mark.parametrize("lr", [0.5, 5.0, 40.0])
def test_critical_sharpness_brackets_the_first_crossing(lr: float) -> None:
    monitor = DirectionalCurvatureMonitor(estimators=("critical",), every_n_train_steps=1, on_error="raise")
    outcome = fit(lr, monitor)
    (row,) = rows_of(outcome)
    crossing = first_crossing(outcome, 0, furthest=100.0 / lr)
    factor = 2.0 / (row["critical_sharpness"] * lr)
    half_width = row["critical_sharpness_error"]
    # A bracket at most 1/16 of its upper end wide: its middle is within (1/32)/(1 − 1/32) = 1/31 of either end.
    assert 0.0 < half_width <= 1.0 / 31.0
    assert factor * (1.0 - half_width) <= crossing <= factor * (1.0 + half_width)
    assert row["headroom"] == pytest.approx(factor, rel=EXACT)


def test_critical_sharpness_follows_the_loss_of_the_whole_window() -> None:
    """From the second step on the search starts at the last value, with dropout's masks and batches of that window."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Dropout(0.3), torch.nn.Linear(8, 3))
    module = Classifier(network.double(), lambda m: torch.optim.SGD(m.parameters(), lr=1.0))
    monitor = DirectionalCurvatureMonitor(estimators=("critical",), every_n_train_steps=1, on_error="raise")
    outcome = run(module, classification(7), monitor, accumulate_grad_batches=3)
    rows = rows_of(outcome)
    assert len(rows) == 3
    for index, row in enumerate(rows):
        factor = 2.0 / row["critical_sharpness"]
        half_width = row["critical_sharpness_error"]
        assert half_width <= 1.0 / 31.0
        crossing = first_crossing(outcome, index, furthest=200.0)
        assert factor * (1.0 - half_width) <= crossing <= factor * (1.0 + half_width)


# Steps of 5e-4 to 5 in a net whose weights have a norm of about 3.
@pytest.mark.parametrize("lr", [1e-3, 1e-2, 0.1, 1.0, 10.0])
def test_the_first_measured_step_however_long(lr: float) -> None:
    outcome = fit(lr, *monitors())
    truth = outcome.reference(0)
    for prefix in ("curvature", "pair"):
        (row,) = rows_of(outcome, prefix)
        assert row["lambda_fd"] == pytest.approx(truth.hessian / truth.descent / lr, rel=DIFFERENCE)
        assert row["lambda_kl"] == pytest.approx(truth.gauss_newton / truth.descent / lr, rel=DIFFERENCE)


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_one_sided_kl_reaches_the_same_digits_once_epsilon_has_adapted(loss: str) -> None:
    """Its truncation falls as ε, not ε²: ε shrinks at most tenfold a step, so the first steps have fewer digits."""
    monitor = DirectionalCurvatureMonitor(estimators=("kl",), every_n_train_steps=1, on_error="raise")
    module = Classifier(mlp(4, 6, 3), lambda m: torch.optim.SGD(m.parameters(), lr=0.3))
    batches = classification(8)
    if loss == "mse":
        module.loss = F.mse_loss
        batches = [(x, F.one_hot(y, 3).double()) for x, y in batches]
    outcome = run(module, batches, monitor)
    errors = []
    for index, (row, step) in enumerate(zip(rows_of(outcome), outcome.steps, strict=True)):
        truth = outcome.reference(index)
        assert row["descent"] == pytest.approx(truth.descent / step.lr, rel=EXACT)
        errors.append(abs(row["lambda_kl"] / (truth.gauss_newton / truth.descent / step.lr) - 1.0))
    assert max(errors[4:]) < DIFFERENCE, errors


def test_a_given_epsilon_is_used_as_it_is() -> None:
    """Second difference and KL at ε = 0.5 differ from their limits by what the loss itself says, not by adaptation."""
    monitor = DirectionalCurvatureMonitor(epsilon=0.5, every_n_train_steps=1, on_error="raise")
    outcome = fit(2.0, monitor, batches=3)
    for index, (row, step) in enumerate(zip(rows_of(outcome), outcome.steps, strict=True)):
        module, truth = outcome.module, outcome.reference(index)
        plus, base, minus = (
            loss_along(module.network, module.loss, step.parts, step.before, step.after, c) for c in (-0.5, 0.0, 0.5)
        )
        assert row["epsilon"] == 0.5
        # Four losses with 1e-16 each over a second difference of about 0.1.
        assert row["lambda_fd"] == pytest.approx((plus - 2.0 * base + minus) / 0.25 / truth.descent / 2.0, rel=1e-12)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_third_step_has_the_values_it_has_when_all_are_measured(accumulate: int) -> None:
    def curve(every: int) -> list[dict[str, float]]:
        monitor = DirectionalCurvatureMonitor(estimators=ALL, every_n_train_steps=every, on_error="raise")
        options = {"batches": 7 * accumulate, "momentum": 0.5, "accumulate_grad_batches": accumulate}
        return rows_of(fit(0.1, monitor, **options))

    every, third = curve(1), curve(3)
    assert (len(every), len(third)) == (7, 3)
    for all_row, row in zip(every[::3], third, strict=True):
        for key in ("lambda_dir", "lambda_gn", "descent", "update_norm"):
            assert row[key] == all_row[key]
            assert math.isfinite(row[key])
