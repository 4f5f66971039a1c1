"""What the tests of the directional monitor have in common."""

from __future__ import annotations

from typing import Any

import torch

from lightning_curvature import DirectionalCurvatureMonitor
from tests.helpers.runs import Batch


def monitor(**options: Any) -> DirectionalCurvatureMonitor:
    return DirectionalCurvatureMonitor(**({"every_n_train_steps": 1} | options))


def regression(count: int) -> list[Batch]:
    g = torch.Generator().manual_seed(2)
    return [tuple(torch.randn(8, size, generator=g).double() for size in (4, 3)) for _ in range(count)]  # type: ignore[misc]


# What is asked of float32: differentiation loses a few of its seven digits to cancellation in the sums over samples
# and parameters; kl and finite_difference have what the best ε leaves between rounding (6e-8 of a loss some thousand
# times the signal) and truncation, in a direction that the next step may change.
SINGLE = {"hvp": 1e-3, "gauss_newton": 1e-3, "kl": 0.01, "finite_difference": 0.05}
