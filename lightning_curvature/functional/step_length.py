"""The choice of ε: rounding of the forward pass against truncation of the Taylor series."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_curvature.arguments import MANY, Rule, check_fields, checked, not_negative, positive, whole

# One measured step lowers ε by at most the first factor and raises it by at most the second: the models are local, and
# if the next step is longer, an ε that is too large does more harm than one that is too small.
_LARGEST_CUT = 10.0
_LARGEST_RISE = 4.0
_GRID = 81

_ERROR = not_negative("pass a relative error", finite=False)
_ORDER, _WEIGHT = whole(1, "1 is one-sided, 2 symmetric", MANY), not_negative("1.0 counts an estimator in full")


@dataclass(frozen=True)
class ErrorModel:
    """Relative error of one estimator as a function of ε, from its terms at one ε.

    Attributes:
        noise: relative error from rounding that adds to the signal; falls as ε⁻², since the signal grows as ε².
        truncation: relative error from higher derivatives; grows as ε to the ``order``.
        order: 1 for one-sided, 2 for symmetric estimates.
        weight: weight of this estimator among those that share the ε.
        crossed: relative error from rounding that multiplies the root of the signal; falls as ε⁻¹.
    """

    noise: float
    truncation: float
    order: int = 2
    weight: float = 1.0
    crossed: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self, noise=_ERROR, truncation=_ERROR, order=_ORDER, weight=_WEIGHT, crossed=_ERROR)

    def total(self, factor: float = 1.0) -> float:
        """Return the expected error at ``factor`` times the ε of the model."""
        return self.noise / factor**2 + self.crossed / factor + self.truncation * factor**self.order


@checked(epsilon=positive("1.0 is the length of the step"), models=Rule("give an ErrorModel each", empty=True))
def choose_epsilon(epsilon: float, models: Sequence[ErrorModel]) -> float:
    """Return the ε between a tenth and four times ``epsilon`` at which the weighted expected error is smallest.

    An error x counts as x/(1+x): an estimator that fails at every ε does not outvote one that works at some.

    Args:
        epsilon: ε at which the models were measured, in steps.
        models: one error model for each estimator that uses this ε.

    Returns:
        The next ε, in steps; ``epsilon`` if no model is finite.

    Example:
        >>> round(choose_epsilon(1.0, [ErrorModel(noise=1e-6, truncation=1e-2)]), 1)  # (1e-6/1e-2)^(1/4)
        0.1
    """
    finite = [m for m in models if math.isfinite(m.noise) and math.isfinite(m.truncation)]
    if not finite:
        return epsilon

    def cost(factor: float) -> float:
        return sum(m.weight * (x := m.total(factor)) / (1.0 + x) for m in finite)

    low, high = -math.log(_LARGEST_CUT), math.log(_LARGEST_RISE)
    factors = (math.exp(low + (high - low) * i / (_GRID - 1)) for i in range(_GRID))
    return epsilon * min(factors, key=cost)
