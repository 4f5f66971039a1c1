"""g is the gradient of the loss, whatever is done to ``p.grad``; d is what the optimizer made of it, also uphill."""

from __future__ import annotations

import math
import re
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_curvature import DirectionalCurvatureMonitor
from lightning_curvature.reporting.loggers import CurvatureWarning
from tests.helpers.runs import Batch, Classifier, Outcome, classification, mlp, run, warned
from tests.oracles.along_step import DIFFERENCE, EXACT, check, monitors, norm_of, rows_of


def spoil(pl_module: pl.LightningModule, factor: float = 0.5) -> None:
    """Turn the gradients into something else of the same size, in place."""
    for p in pl_module.parameters():
        assert p.grad is not None
        p.grad.mul_(factor).add_(p.detach(), alpha=0.3)


class BeforeStep(pl.Callback):
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        spoil(pl_module)


class AfterBackward(pl.Callback):
    def __init__(self, factor: float = 0.5) -> None:
        self.factor = factor

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        spoil(pl_module, self.factor)


def sgd() -> Classifier:
    return Classifier(mlp(4, 6, 3), lambda m: torch.optim.SGD(m.parameters(), lr=0.3))


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.thinned(3)
def test_a_callback_that_changes_gradients_before_the_step(first: bool, accumulate: int) -> None:
    callbacks = [BeforeStep(), *monitors()] if first else [*monitors(), BeforeStep()]
    outcome = run(sgd(), classification(4), *callbacks, accumulate_grad_batches=accumulate)
    check(outcome, steps=4 if accumulate == 1 else 2)
    if accumulate == 1:
        # The change has reached the update: with SGD Δθ is the gradient as changed, no longer that of the loss.
        free = run(sgd(), classification(1), *monitors())
        assert norm_of(outcome.steps[0]) > 1.1 * norm_of(free.steps[0])


class ChangesItsOwn(Classifier):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        spoil(self)


def test_a_module_that_changes_its_gradients_itself() -> None:
    module = ChangesItsOwn(mlp(4, 6, 3), lambda m: torch.optim.SGD(m.parameters(), lr=0.3))
    check(run(module, classification(3), *monitors()), steps=3)


def test_gradients_changed_right_after_backward_by_a_later_callback() -> None:
    check(run(sgd(), classification(3), *monitors(), AfterBackward()), steps=3)


def test_gradients_changed_grossly_before_the_monitor_are_seen_through() -> None:
    """The symmetric pair of losses tells that the gradient is another, and replaces it."""
    with pytest.warns(CurvatureWarning, match="gradient after backward is not that of the loss"):
        outcome = run(sgd(), classification(4), AfterBackward(factor=3.0), *monitors())
    for index, (exact, pair, step) in enumerate(
        zip(rows_of(outcome), rows_of(outcome, "pair"), outcome.steps, strict=True)
    ):
        truth = outcome.reference(index)
        assert exact["descent"] == pytest.approx(truth.descent / step.lr, rel=EXACT)
        assert pair["descent"] == pytest.approx(truth.descent / step.lr, rel=DIFFERENCE)
        assert pair["lambda_fd"] == pytest.approx(truth.hessian / truth.descent / step.lr, rel=DIFFERENCE)
        assert pair["lambda_kl"] == pytest.approx(truth.gauss_newton / truth.descent / step.lr, rel=DIFFERENCE)


CHANGES = {"scaled": lambda g: 0.25 * g, "clamped": lambda g: g.clamp(-1e-2, 1e-2), "a little": lambda g: 0.96 * g}


@pytest.mark.parametrize("likelihood", ["auto", "categorical"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("estimator", ["kl", "finite_difference", "gauss_newton", "hvp"])
@pytest.mark.thinned(3)
def test_hooks_on_parameters_are_seen_through_by_each_estimator_alone(
    estimator: Any, change: str, likelihood: Any
) -> None:
    """gᵀd is that of the loss; where a kept gradient told otherwise, one sentence says both numbers."""
    module = sgd()
    for p in module.parameters():
        p.register_hook(CHANGES[change])
    options: Any = {"estimators": (estimator,), "every_n_train_steps": 1, "likelihood": likelihood}
    follow = DirectionalCurvatureMonitor(**options, on_error="raise")
    found: list[Outcome] = []
    messages = warned(lambda: found.append(run(module, classification(4), follow)))
    (outcome,) = found
    for index, (row, step) in enumerate(zip(rows_of(outcome), outcome.steps, strict=True)):
        truth = outcome.reference(index)
        quadratic = truth.gauss_newton if estimator in ("kl", "gauss_newton") else truth.hessian
        value = quadratic / truth.descent / step.lr
        tolerance = EXACT if estimator in ("hvp", "gauss_newton") else DIFFERENCE
        key = {"kl": "kl", "finite_difference": "fd", "gauss_newton": "gn", "hvp": "dir"}[estimator]
        assert row[f"lambda_{key}"] == pytest.approx(value, rel=tolerance)
        assert row[f"lambda_{key}_error"] < 1e-3
    exact = estimator in ("hvp", "gauss_newton")
    assert len(messages) == (0 if exact else 1)
    assert exact or re.search(r"not that of the loss, got gᵀd = \S+ where the loss has \S+: that is taken", messages[0])


UPHILL = 5


def turning_batches() -> list[Batch]:
    """The same samples with the labels turned once: momentum goes on where they led, on UPHILL against the slope."""
    x, y = classification(1)[0]
    return [(x, y)] * 4 + [(x, (y + 1) % 3), (x, y)]


def heavy_ball(*callbacks: pl.Callback) -> Outcome:
    module = Classifier(mlp(4, 6, 3), lambda m: torch.optim.SGD(m.parameters(), lr=1.0, momentum=0.9))
    return run(module, turning_batches(), *callbacks)


def test_uphill_steps_have_no_curvature() -> None:
    outcome = heavy_ball(*monitors())
    truths = check(outcome, steps=6, uphill=1)
    assert truths[UPHILL].descent < 0.0
    for prefix in ("curvature", "pair"):
        row = rows_of(outcome, prefix)[UPHILL]
        assert row["descent"] == pytest.approx(truths[UPHILL].descent, rel=EXACT)
        # The even part of the loss curves upward on this step: the ratio itself would have been negative.
        assert truths[UPHILL].hessian > 0.0
        assert math.isnan(row["headroom"])
        assert all(math.isnan(value) for key, value in row.items() if key in ("lambda_fd", "lambda_kl", "lambda_dir"))


@pytest.mark.parametrize("estimator", ["hvp", "gauss_newton", "kl", "finite_difference", "critical"])
def test_uphill_steps_have_no_curvature_by_any_single_estimator(estimator: Any) -> None:
    monitor = DirectionalCurvatureMonitor(estimators=(estimator,), every_n_train_steps=1, on_error="raise")
    row = rows_of(heavy_ball(monitor))[UPHILL]
    (key,) = {"lambda_dir", "lambda_gn", "lambda_kl", "lambda_fd", "critical_sharpness"} & set(row)
    assert math.isnan(row[key])
    assert math.isnan(row["headroom"])
    assert row["descent"] < 0.0


def test_curvature_watched_by_other_callbacks_skips_uphill_steps() -> None:
    """EarlyStopping takes NaN for the end: it sees the last step that had a value."""
    outcome = heavy_ball(DirectionalCurvatureMonitor(estimators=("hvp",), every_n_train_steps=UPHILL))
    rows = rows_of(outcome)
    assert [math.isnan(row["lambda_dir"]) for row in rows] == [False, True]
    watched = float(outcome.trainer.callback_metrics["curvature/lambda_dir"])
    # callback_metrics are float32: 6e-8.
    assert watched == pytest.approx(rows[0]["lambda_dir"], rel=1e-6)
