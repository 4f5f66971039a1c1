"""Metrics that are a ratio of two means over draws, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_curvature.metrics import RatioOfMeans, StabilizationCriterion
from tests.testers.metric_case import MetricCase, Mistake
from tests.testers.metric_cases.directional import NO_MODEL

# Sums of a dozen terms of one sign and one size.
REL = 1e-14
# Their squares about the mean, which cancel to a tenth.
MORE_REL = 1e-12


def errors(metric: Any) -> dict[str, Any]:
    return {"standard_error": metric.standard_error(), "count": metric.count()}


DRAWS = [(1.0, 2.0), (3.0, 1.5), (2.5, 0.5), (4.0, 1.0), (0.5, 3.0), (7.0, 1.0)]


def ratio(draws: Sequence[Any]) -> float:
    return sum(x for x, _ in draws) / sum(y for _, y in draws)


def increments() -> list[tuple[Tensor]]:
    """One to five perturbations, some with two candidates."""
    g = torch.Generator().manual_seed(0)
    shapes = [(3,), (1, 2), (5,), (2, 2), (4,), (1,)]
    return [(torch.randn(*shape, generator=g, dtype=torch.float64),) for shape in shapes]


def mean_power(updates: Sequence[Any]) -> float:
    """E|Δ|³ over perturbations, of each the mean over candidates."""
    powers = [(increment.abs() ** 3).reshape(len(increment), -1).mean(1) for (increment,) in updates]
    return float(torch.cat(powers).mean())


CASES = [
    MetricCase(
        name="ratio",
        kind=RatioOfMeans,
        make=RatioOfMeans,
        updates=DRAWS,
        reference=ratio,
        rel=REL,
        more=errors,
        more_rel=MORE_REL,
        failing=[("none",)],
        halting=(1.0, torch.ones(2)),
        absent=NO_MODEL,
    ),
    MetricCase(
        name="stabilization",
        kind=StabilizationCriterion,
        make=lambda: StabilizationCriterion(3.0),
        updates=increments(),
        reference=mean_power,
        rel=REL,
        more=errors,
        more_rel=MORE_REL,
        failing=[(torch.tensor(1.0),)],
        mistakes=[
            Mistake(
                lambda: StabilizationCriterion(0), "order must be positive and finite, got 0: 2 is the mean square"
            ),
            Mistake(
                lambda: StabilizationCriterion().update(torch.tensor(1.0)),
                r"increments must have a dimension of draws, got a scalar: give \(S,\)",
            ),
        ],
        absent=NO_MODEL | {"update_that_stops_halfway_adds_nothing": "update has one argument, which it checks"},
    ),
]
