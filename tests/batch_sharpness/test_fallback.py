"""Losses without second derivatives: mini-batches are multiplied by differences of gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_curvature import BatchSharpnessMonitor, CurvatureWarning
from tests.helpers import ctc
from tests.helpers.counting import on_forward
from tests.helpers.once import Square
from tests.helpers.runs import Capture, Classifier, make_trainer, rows

QUANTITIES = ("step_sharpness", "batch_sharpness", "modified_batch_sharpness", "ias", "gni", "lambda_gen")
SENTENCE = r"products with the Hessian are differences of gradients from here on, since second derivatives are missing"


def module(loss: str, once: bool) -> Classifier:
    """CTC, or a network that is squared; with second derivatives or without."""
    network = ctc.network()
    if loss == "ctc":
        return Classifier(network, sgd, ctc.of_torch if once else ctc.by_hand)
    network[1] = Square(once)
    return Classifier(network, sgd, ctc.by_hand)


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.1)


def measured(learner: Classifier, *quantities: str, **options: Any) -> tuple[dict[int, dict[str, float]], list[int]]:
    """Rows of two measurements, and one entry a forward."""
    capture, passes = Capture(), list[int]()
    on_forward(learner.network, lambda *args: passes.append(1))
    given: Any = quantities
    follow = BatchSharpnessMonitor(
        quantities=given, every_n_train_steps=2, num_batches=6, min_batches=6, tolerance=1e-8, **options
    )
    data = DataLoader(TensorDataset(*ctc.samples(16)), batch_size=4)
    make_trainer(follow, logger=capture).fit(learner, data)
    return rows(capture), passes


@pytest.mark.parametrize("full_hessian", ["pairs", "exact"])
@pytest.mark.parametrize("loss", ["ctc", "squares"])
@pytest.mark.slow
def test_values_are_those_with_second_derivatives(loss: str, full_hessian: Any) -> None:
    names, options = (*QUANTITIES, "lambda_max_b"), {"full_hessian": full_hessian}
    with pytest.warns(CurvatureWarning, match=SENTENCE) as said:
        found, _ = measured(module(loss, once=True), *names, **options)
    assert len([one for one in said if issubclass(one.category, CurvatureWarning)]) == 1
    exact, _ = measured(module(loss, once=False), *names, batches_at_once=1, **options)
    assert list(found) == list(exact) == [0, 2]
    for step, row in exact.items():
        for name in names:
            # Products to 1e-9 in float64; a ratio of two of them may have lost a digit or two.
            assert found[step][name] == pytest.approx(row[name], rel=1e-6), (step, name)
            assert found[step][name] != row[name]


def test_passes() -> None:
    """A product takes two; the sides are looked at once for each mini-batch, the distance is measured once in a fit."""
    learner = module("ctc", once=True)
    with pytest.warns(CurvatureWarning, match=SENTENCE):
        _, passes = measured(learner, "batch_sharpness", batches_at_once=1)
    exact, plain = measured(module("ctc", once=False), "batch_sharpness", batches_at_once=1)
    assert all(math.isfinite(row["batch_sharpness"]) for row in exact.values())
    batches = 2 * 6
    # Exactly, one forward serves gradient and product. By differences the gradient takes one, the sides one, the
    # product two; the first mini-batch keeps its gradient from before, and measures the distance.
    assert len(passes) - len(plain) == 3 * batches + 2 * (1 + 6)


def test_the_gauss_newton_matrix_does_not_fall_back() -> None:
    learner = module("ctc", once=True)
    with pytest.warns(CurvatureWarning, match="BatchSharpnessMonitor logs NaN"):
        found, _ = measured(learner, "batch_sharpness", curvature="gauss_newton", outputs="network", on_error="warn")
    assert all(math.isnan(row["batch_sharpness"]) for row in found.values())
