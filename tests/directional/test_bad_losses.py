"""Losses that cannot be measured: one clear sentence, or NaN with one warning; training goes on where it can."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_curvature import CurvatureWarning
from tests.helpers.directional import monitor, regression
from tests.helpers.modules import Plain
from tests.helpers.runs import Batch, classification, run, warned


class Returns(Plain):
    """Its step returns what ``change`` makes of the loss."""

    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.change = change

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        return self.change(F.cross_entropy(self(batch[0]), batch[1]))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda loss: loss.expand(3),
            r"loss must be a scalar, got shape \(3,\): reduce it, for example with .mean\(\)",
        ),
        (
            lambda loss: loss.detach(),
            r"must return a loss that requires grad, got a constant: leave no_grad and detach",
        ),
    ],
)
def test_losses_that_cannot_be_trained(change: Callable[[Tensor], Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        run(Returns(change), classification(2), monitor(on_error="raise"))
    with pytest.raises(RuntimeError, match=r"grad"):  # else the word is torch's
        run(Returns(change), classification(2), monitor())


def test_a_loss_in_a_vector_of_one_is_a_scalar() -> None:
    outcome = run(Returns(lambda loss: loss.reshape(1)), classification(2), monitor(on_error="raise"))
    assert all(v > 0 for v in outcome.capture.curve("curvature/lambda_kl"))


def nothing_left(module: Any, batch: Any) -> Any:
    raise KeyError("labels")


BAD_OBJECTIVES = [
    (lambda m, batch: m(batch[0]), r"loss must be a scalar, got shape \(8, 3\)"),
    (lambda m, batch: 3.0, r"must return a loss tensor or a dict with 'loss', got float: return the loss"),
    (
        lambda m, batch: {"outputs": m(batch[0])},
        r"must return a loss tensor or a dict with 'loss', got a dict of \['outputs'\]",
    ),
    (nothing_left, r"KeyError: 'labels'"),
]


@pytest.mark.parametrize(("objective", "sentence"), BAD_OBJECTIVES)
def test_training_outlives_an_evaluation_that_fails(objective: Any, sentence: str) -> None:
    module, found = Plain(), list[Any]()
    options = {"objective": objective, "estimators": ["finite_difference", "hvp"]}
    messages = warned(lambda: found.append(run(module, classification(3), monitor(**options))))
    assert module.seen == 3
    _, end = messages  # the same sentence at each of the three steps, and once how many there were
    assert end.startswith("DirectionalCurvatureMonitor must make the measurements that are due, got 0 of 3: ")
    assert re.search(sentence, end)
    with pytest.warns(CurvatureWarning, match=sentence):
        run(Plain(), classification(1), monitor(**options))
    for key in ("lambda_fd", "lambda_dir", "headroom", "descent"):
        values = found[0].capture.curve(f"curvature/{key}")
        assert len(values) == 3
        assert all(math.isnan(v) for v in values)
    with pytest.raises(
        KeyError if objective is nothing_left else ValueError, match=sentence.removeprefix("KeyError: ")
    ):
        run(Plain(), classification(1), monitor(on_error="raise", **options))


def poisoned(batches: list[Batch], *indices: int) -> list[Batch]:
    return [(x * math.nan if i in indices else x, y) for i, (x, y) in enumerate(batches)]


ESTIMATORS = [("kl", "finite_difference"), ("kl",), ("hvp",), ("gauss_newton",), ("critical",)]


@pytest.mark.parametrize("estimators", ESTIMATORS)
@pytest.mark.parametrize("data", [classification, regression])
def test_a_nan_loss_is_logged_as_nan_with_one_warning(estimators: tuple[str, ...], data: Any) -> None:
    module = Plain(loss=F.cross_entropy if data is classification else F.mse_loss)
    found: list[Any] = []
    batches = poisoned(data(3), 0, 1, 2)
    messages = warned(lambda: found.append(run(module, batches, monitor(estimators=estimators))))
    assert module.seen == 3
    assert len(messages) == 1
    assert "the loss or its gradient is not finite" in messages[0]
    assert messages[0].endswith("logging NaN.")
    for key in ("headroom", "descent"):
        values = found[0].capture.curve(f"curvature/{key}")
        assert len(values) == 3
        assert all(math.isnan(v) for v in values)


class Guarded(Plain):
    """Leaves out steps whose gradient is not finite, as users do."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        for p in self.parameters():
            if p.grad is not None and not p.grad.isfinite().all():
                p.grad.zero_()


@pytest.mark.parametrize("data", [classification, regression])
@pytest.mark.parametrize("bad", [0, 1])
def test_measuring_goes_on_after_a_nan_loss(data: Any, bad: int) -> None:
    module = Guarded(loss=F.cross_entropy if data is classification else F.mse_loss)
    with pytest.warns(CurvatureWarning, match="not finite"):
        outcome = run(module, poisoned(data(3), bad), monitor())
    for key in ("lambda_kl", "lambda_fd"):
        finite = [math.isfinite(v) for v in outcome.capture.curve(f"curvature/{key}")]
        assert finite == [index != bad for index in range(3)]


class Elsewhere(Plain):
    """The loss does not depend on what the optimizer holds."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.ones(2))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([self.unused], lr=0.1)


def test_no_parameters_with_gradients() -> None:
    module, sentence = Elsewhere(), r"optimizer must hold parameters with gradients, got none"
    with pytest.warns(CurvatureWarning, match=sentence):
        outcome = run(module, classification(2), monitor())
    assert module.seen == 2
    assert all(math.isnan(v) for v in outcome.capture.curve("curvature/lambda_kl"))
    assert len(outcome.capture.curve("curvature/lambda_kl")) == 2
    with pytest.raises(ValueError, match=sentence):
        run(Elsewhere(), classification(2), monitor(on_error="raise"))
