"""Choosing ε: the rounding of the forward pass against the truncation of the Taylor series."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

# One measured step moves ε by at most this factor: the models below are local.
_LARGEST_MOVE = 10.0
_GRID = 81


@dataclass(frozen=True)
class ErrorModel:
    """Relative error of one estimator as a function of ε, known at one ε.

    Attributes:
        noise: relative error from rounding; falls as ε⁻², since the signal grows as ε².
        truncation: relative error from higher derivatives; grows as ε to the ``order``.
        order: 1 for one-sided, 2 for symmetric estimates.
        weight: how much this estimator counts when several share one ε.
    """

    noise: float
    truncation: float
    order: int = 2
    weight: float = 1.0

    def total(self, factor: float = 1.0) -> float:
        """Error expected at ``factor`` times the ε of the model."""
        return self.noise / factor**2 + self.truncation * factor**self.order


def choose_epsilon(epsilon: float, models: Sequence[ErrorModel]) -> float:
    """Return the ε within a factor of ten of ``epsilon`` at which the weighted expected error is least.

    An error x counts as x/(1+x): an estimator that is lost either way does not outvote one that can be had.

    Args:
        epsilon: ε at which the models were measured, in steps.
        models: one error model for each estimator that uses this ε.

    Returns:
        The next ε, in steps; ``epsilon`` itself where no model is finite.
    """
    finite = [m for m in models if math.isfinite(m.noise) and math.isfinite(m.truncation)]
    if not finite:
        return epsilon

    def cost(factor: float) -> float:
        return sum(m.weight * (x := m.total(factor)) / (1.0 + x) for m in finite)

    exponents = (2.0 * i / (_GRID - 1) - 1.0 for i in range(_GRID))
    return epsilon * min((_LARGEST_MOVE**e for e in exponents), key=cost)
