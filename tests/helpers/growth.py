"""Loss increments under one more sample, by the oracle."""

from __future__ import annotations

from lightning_curvature.functional import (
    QuadraticIncrement,
)
from tests.oracles.sample_growth import (
    Increment,
)


def model_of(one: Increment) -> QuadraticIncrement:
    return QuadraticIncrement(one.a, one.c, one.b)
