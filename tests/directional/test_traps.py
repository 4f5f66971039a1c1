"""Modules that look ordinary and are not: each once gave a wrong number, or none."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_curvature import DirectionalCurvatureMonitor
from lightning_curvature.reporting.loggers import CurvatureWarning
from tests.helpers.runs import Batch, Classifier, Outcome, classification, mlp, run
from tests.oracles.along_step import ALL, DIFFERENCE, EXACT


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.3)


def monitor(*estimators: str, **options: Any) -> DirectionalCurvatureMonitor:
    return DirectionalCurvatureMonitor(estimators=estimators or ALL, every_n_train_steps=1, **options)  # type: ignore[arg-type]


def check(outcome: Outcome, keys: dict[str, float], steps: int) -> None:
    """Values of all steps against the dense oracle; ``keys``: tolerances."""
    for index in range(steps):
        truth, step, row = outcome.reference(index), outcome.steps[index], outcome.capture.rows[index]
        for key, tolerance in keys.items():
            quadratic = truth.gauss_newton if key in ("lambda_kl", "lambda_gn") else truth.hessian
            assert row[f"curvature/{key}"] == pytest.approx(quadratic / truth.descent / step.lr, rel=tolerance), key


FOUR = {"lambda_dir": EXACT, "lambda_gn": EXACT, "lambda_fd": DIFFERENCE, "lambda_kl": DIFFERENCE}


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.body, self.head, self.reentrant, self.plain = mlp(4, 6, 6), mlp(6, 3), reentrant, False

    def forward(self, x: Tensor) -> Tensor:
        if self.plain:
            return self.head(self.body(x))
        return self.head(checkpoint(self.body, x.requires_grad_(), use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_have_second_derivatives(reentrant: bool) -> None:
    module = Classifier(Checkpointed(reentrant), sgd)
    outcome = run(module, classification(2), monitor())
    module.network.plain = True  # the oracle's substituted parameters are gone when a checkpoint is computed again
    check(outcome, FOUR, steps=2)


def test_an_ignored_class_that_the_first_batch_does_not_hold() -> None:
    """The first batch fits plain cross-entropy; from the second on it must be seen that class 0 is left out."""
    batches = classification(3)
    batches[0] = (batches[0][0], batches[0][1].clamp_min(1))
    module = Classifier(mlp(4, 6, 3), sgd, loss=lambda z, y: F.cross_entropy(z, y, ignore_index=0))
    # One point: the truncation of O(ε) at the ε of rounding in float64, (u L / q)^⅓ of about 1e-5, with room for ten.
    check(run(module, batches, monitor("kl")), {"lambda_kl": 1e-4}, steps=3)
    check(run(module, batches, monitor()), FOUR, steps=3)


@pytest.mark.parametrize(("weight", "known"), [(0.02, True), (20.0, False)])
def test_a_named_likelihood_that_is_another(weight: float, known: bool) -> None:
    """What is named is kept, and the mismatch of the loss is part of its error; NaN where the slope is another."""

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z, y) + weight * z.square().mean()

    with pytest.warns(CurvatureWarning, match="not the mean categorical negative log-likelihood"):
        outcome = run(Classifier(mlp(4, 6, 3), sgd, loss), classification(2), monitor("kl", likelihood="categorical"))
    for index in range(2):
        truth, row = outcome.reference(index), outcome.capture.rows[index]
        off = abs(row["curvature/lambda_kl"] / (truth.gauss_newton / truth.descent / 0.3) - 1.0)
        assert math.isfinite(off) == known
        assert not known or 1e-4 < row["curvature_diagnostics/lambda_kl_error"] <= 1.0


def test_weights_that_the_loss_does_not_show() -> None:
    """All classes are alike at first, and any weights give the same loss: the slope along the step tells."""
    weight = torch.tensor([1.0, 4.0, 0.2], dtype=torch.float64)
    network = mlp(4, 6, 3)
    with torch.no_grad():
        network[-1].weight.mul_(1e-4)
        network[-1].bias.zero_()
    module = Classifier(network, sgd, lambda z, y: F.cross_entropy(z, y, weight=weight))
    outcome = run(module, classification(4), monitor())
    truth, row = outcome.reference(0), outcome.capture.rows[0]
    for key in ("lambda_kl", "lambda_gn"):  # the reading by chance, of which the error says as much
        off = abs(row[f"curvature/{key}"] / (truth.gauss_newton / truth.descent / 0.3) - 1.0)
        assert not off <= 0.1
        assert math.isnan(off) or off <= row[f"curvature_diagnostics/{key}_error"]
    for index in (1, 2, 3):
        truth, row = outcome.reference(index), outcome.capture.rows[index]
        value = truth.gauss_newton / truth.descent / 0.3
        assert row["curvature/lambda_gn"] == pytest.approx(value, rel=EXACT)
        assert row["curvature/lambda_kl"] == pytest.approx(value, rel=DIFFERENCE)


def test_mean_and_sum_that_one_sample_cannot_tell_apart() -> None:
    batches = [(x[:1], y[:1]) if i == 0 else (x, y) for i, (x, y) in enumerate(classification(3))]
    module = Classifier(mlp(4, 6, 3), lambda m: torch.optim.SGD(m.parameters(), lr=0.02))
    module.loss = lambda z, y: F.cross_entropy(z, y, reduction="sum")
    with warnings.catch_warnings():
        warnings.simplefilter("error", CurvatureWarning)
        outcome = run(module, batches, monitor("kl", "gauss_newton"))
    check(outcome, {"lambda_gn": EXACT}, steps=3)


def test_labels_out_of_range_that_the_loss_ignores() -> None:
    batches: list[Batch] = [(x, y.masked_fill(torch.arange(8) < 2, 255)) for x, y in classification(2)]
    module = Classifier(mlp(4, 6, 3), sgd, loss=lambda z, y: F.cross_entropy(z, y, ignore_index=255))
    check(run(module, batches, monitor()), FOUR, steps=2)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = mlp(4, 6, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.body(x)
        return z, z.square().mean()


def test_the_first_of_a_tuple_counts_as_the_outputs() -> None:
    class First(Classifier):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch[0])[0], batch[1])

    outcome = run(First(Pair(), sgd), classification(2), monitor("gauss_newton", "kl"))
    for row in outcome.capture.rows.values():
        if "curvature/lambda_gn" in row:
            # One-sided, O(ε) at ε of about 1e-4 of a step's worth of bend.
            assert row["curvature/lambda_kl"] == pytest.approx(row["curvature/lambda_gn"], rel=1e-3)


class NoForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Strange(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = mlp(4, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return NoForwardMode.apply(self.body(x))  # type: ignore[no-any-return]


def test_a_missing_derivative_costs_only_what_needs_it() -> None:
    with pytest.warns(CurvatureWarning, match="logs NaN"):
        outcome = run(Classifier(Strange(), sgd), classification(2), monitor("gauss_newton", "kl", "finite_difference"))
    check(outcome, {"lambda_fd": DIFFERENCE, "lambda_kl": DIFFERENCE}, steps=2)
    assert all(math.isnan(row["curvature/lambda_gn"]) for row in outcome.capture.rows.values())


def test_a_batch_without_a_loss_inside_a_window() -> None:
    class Skips(Classifier):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    capture = run(Skips(mlp(4, 6, 3), sgd), classification(3), monitor("hvp"), accumulate_grad_batches=3).capture
    values = capture.curve("curvature/lambda_dir")
    assert len(values) == 1
    assert math.isfinite(values[0])


def test_a_moving_average_kept_in_the_optimizer_is_not_advanced() -> None:
    class Averaging(torch.optim.SGD):
        calls = 0

        def after(self) -> None:
            self.calls += 1

        def step(self, closure: Any = None) -> Any:
            self.after()
            return super().step(closure)

    class Manual(Classifier):
        def __init__(self) -> None:
            super().__init__(mlp(4, 6, 3), lambda m: Averaging(m.parameters(), lr=0.1))
            self.automatic_optimization = False

        def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(self(batch[0]), batch[1]))
            optimizer.optimizer.step()

    outcome = run(Manual(), classification(3), monitor("kl", "finite_difference"))
    assert outcome.trainer.optimizers[0].calls == 3  # type: ignore[attr-defined]
