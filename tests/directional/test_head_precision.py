"""λ_KL and λ_GN through the head of a loss in bf16 against float64: twelve networks and losses, real digits."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_curvature import DirectionalCurvatureMonitor
from tests.helpers.digits import Attending, convolving, digits
from tests.helpers.runs import Classifier, Step, mlp, run

WEIGHT = torch.linspace(0.3, 2.0, 10)
STEPS = 24


def focal(z: Tensor, y: Tensor) -> Tensor:
    log_p = z.log_softmax(-1).gather(1, y[:, None])
    return (-((1.0 - log_p.exp()) ** 2) * log_p).mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "focal": focal,
    "Brier": lambda z, y: (z.softmax(-1) - F.one_hot(y, 10)).square().sum(-1).mean(),
    "class weights": lambda z, y: F.cross_entropy(z, y, weight=WEIGHT.to(z.dtype)),
    "label smoothing": lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1),
}
NETWORKS: list[Callable[[], nn.Module]] = [lambda: mlp(64, 48, 48, 10, dtype=torch.float32), Attending, convolving]


def truth(network: nn.Module, loss: Any, step: Step) -> tuple[float, float]:
    """uᵀ(∇²ℓ)u and gᵀd of a step in float64, u the change of the outputs along it."""
    network, (part,) = copy.deepcopy(network).double(), step.parts
    theta = {name: p.double() for name, p in step.before.items()}
    d = {name: p - step.after[name].double() for name, p in theta.items()}
    outputs = lambda values: torch.func.functional_call(network, values, (part.x.double(),))  # noqa: E731
    z, u = torch.func.jvp(outputs, (theta,), (d,))
    slope, bend = torch.func.jvp(torch.func.grad(lambda z: loss(z, part.y)), (z,), (u,))
    return float((bend * u).sum()), float((slope * u).sum())


@cache
def ratios(precision: str) -> dict[str, list[float]]:
    """The logged error over the true one, of all values of a precision by key."""
    found: dict[str, list[float]] = {"lambda_kl": [], "lambda_gn": []}
    for make in NETWORKS:
        for loss in LOSSES.values():
            torch.manual_seed(0)
            module = Classifier(make(), lambda m: torch.optim.SGD(m.parameters(), lr=0.2, momentum=0.9), loss)
            batches = [(x.bfloat16() if precision == "bf16-true" else x, y) for x, y in digits(64, STEPS)]
            estimators: Any = ("kl", "finite_difference", "gauss_newton")
            follow = DirectionalCurvatureMonitor(estimators=estimators, every_n_train_steps=1)
            outcome = run(module, batches, follow, precision=precision)
            for index, step in enumerate(outcome.steps):
                (quadratic, descent), row = truth(module.network, loss, step), outcome.capture.rows[index]
                for key, ratio in found.items():
                    value = row[f"curvature/{key}"]
                    if math.isfinite(value) and descent > 0.0:
                        off = abs(value * descent * step.lr / quadratic - 1.0)
                        ratio.append(row[f"curvature_diagnostics/{key}_error"] / off)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("key", ["lambda_kl", "lambda_gn"])
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_the_error_covers_the_true_one(precision: str, key: str) -> None:
    """Nine in ten, and not ten times too large in the median; most steps have a value."""
    found = ratios(precision)[key]
    assert len(found) >= 0.8 * STEPS * len(NETWORKS) * len(LOSSES)
    assert sum(ratio >= 1.0 for ratio in found) >= 0.9 * len(found)
    assert sorted(found)[len(found) // 2] <= 10.0
