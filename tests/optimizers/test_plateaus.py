"""Where batch sharpness settles: the plateaus of the optimizer at hand, and the sentence that says so."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import ASGD, SGD, Adam, RMSprop

from lightning_curvature.functional import sharpness_plateaus
from lightning_curvature.optimizers.plateaus import momentum_plateaus, plateau_note

MOMENTUM = "under momentum batch sharpness does not settle at 2/η, but at plateau_small_batch"
UNKNOWN = (
    "2/η is where batch sharpness settles under SGD without momentum, and no such value is known for the {} at hand:"
)
INDEX = " look at StabilityMonitor's index, or at 'update_sharpness'."


def weights(count: int = 1) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(2)) for _ in range(count)]


def groups(*settings: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"params": weights(), **setting} for setting in settings]


@pytest.mark.parametrize(
    ("make", "expected", "note"),
    [
        (lambda: SGD(weights(), lr=0.1), None, None),
        (lambda: SGD(weights(), lr=0.1, dampening=0.5, weight_decay=0.1), None, None),
        (lambda: SGD(weights(), lr=0.1, momentum=0.9, weight_decay=0.1), sharpness_plateaus(0.1, 0.9), MOMENTUM),
        (
            lambda: SGD(weights(), lr=0.1, momentum=0.9, nesterov=True),
            sharpness_plateaus(0.1, 0.9, nesterov=True),
            MOMENTUM,
        ),
        (
            lambda: SGD(weights(), lr=0.1, momentum=0.9, dampening=0.5),
            sharpness_plateaus(0.1, 0.9, dampening=0.5),
            MOMENTUM,
        ),
        (lambda: SGD(weights(), lr=0.0, momentum=0.9), (math.inf, math.inf), MOMENTUM),
        # η of the first group, as in 2/η.
        (lambda: SGD(groups({"lr": 0.2}, {"lr": 0.1}), momentum=0.9), sharpness_plateaus(0.2, 0.9), MOMENTUM),
        (lambda: SGD(groups({}, {"momentum": 0.5}), lr=0.1), None, UNKNOWN.format("SGD") + INDEX),
        (lambda: SGD(weights(), lr=0.1, maximize=True), None, UNKNOWN.format("SGD") + " look at 'update_sharpness'."),
        (lambda: Adam(weights(), lr=0.1), None, UNKNOWN.format("Adam") + INDEX),
        (lambda: RMSprop(weights(), lr=0.1, momentum=0.9), None, UNKNOWN.format("RMSprop") + INDEX),
        (lambda: ASGD(weights(), lr=0.1), None, UNKNOWN.format("ASGD") + " look at 'update_sharpness'."),
    ],
)
def test_of_each_optimizer(make: Callable[[], Any], expected: tuple[float, float] | None, note: str | None) -> None:
    optimizer = make()
    assert momentum_plateaus(optimizer) == expected
    said = plateau_note(optimizer)
    assert said is None if note is None else (said or "").startswith(note)
