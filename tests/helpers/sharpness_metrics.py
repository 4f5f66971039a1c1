"""Metrics of mini-batch sharpness on a small network, and the values of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_curvature.metrics import (
    BatchLambdaMax,
    BatchSharpness,
    GradientNoiseInteraction,
    InteractionAwareSharpness,
    ModifiedBatchSharpness,
    StepSharpness,
)
from tests.helpers.runs import Batch, classification, mlp

# Means of a few draws in another order.
CLOSE = {"rel": 1e-12}


BATCHES = classification(6, 3)


DATA = classification(2, 4, seed=2)


Make = Callable[..., Any]


METRICS: dict[str, Make] = {
    "batch": BatchSharpness,
    "modified": ModifiedBatchSharpness,
    "step": StepSharpness,
    "lambda_max": lambda *args, **options: BatchLambdaMax(*args, tolerance=1e-6, **options),
    "ias": InteractionAwareSharpness,
    "ias, data": lambda *args, **options: InteractionAwareSharpness(*args, data=DATA, **options),
    "gni": GradientNoiseInteraction,
    "gni, data": lambda *args, **options: GradientNoiseInteraction(*args, data=DATA, **options),
}


# At θ = 1: gradients h·(1 − a) = 0 and −h.
STILL, MOVING = (torch.tensor([a], dtype=torch.float64) for a in (1.0, 2.0))


def made(name: str, network: nn.Module | None = None) -> Any:
    return METRICS[name](network or mlp(4, 3, 3), F.cross_entropy)


def value_of(name: str, batches: list[Batch], network: nn.Module | None = None) -> float:
    return fed(made(name, network), batches)


def fed(metric: Any, batches: Any) -> float:
    for x, y in batches:
        metric.update(x, y)
    value = metric.compute()
    assert value.dtype == torch.float64
    return float(value)


class Point(nn.Module):
    """One parameter θ, the output for every sample."""

    def __init__(self, theta: float) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([theta], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.theta.expand(len(x))


CURVATURE = 1.5


def quadratic(z: Tensor, a: Tensor) -> Tensor:
    return 0.5 * CURVATURE * (z - a).square().mean()
