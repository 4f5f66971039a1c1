"""The line search for the step length at which the loss would first rise."""

import math
from collections.abc import Callable
from dataclasses import dataclass

# The bracket is halved until its width is this fraction of its upper end.
CRITICAL_TOLERANCE = 1.0 / 16.0


@dataclass(frozen=True)
class CriticalStep:
    """Outcome of the line search.

    Attributes:
        factor: η_c/η, NaN where the cap on forwards came first.
        half_width: relative half width of the last bracket.
        forwards: passes made.
        capped: whether the cap came before the bracket was narrow enough.
    """

    factor: float
    half_width: float
    forwards: int
    capped: bool


def critical_step(loss_at: Callable[[float], float], base_loss: float, start: float, max_forwards: int) -> CriticalStep:
    """Return the step length at which the loss first exceeds its value at θ_t.

    From ``start`` (the last value) the length doubles while the loss has not increased, or halves while it has; then
    the bracket is bisected. A NaN or infinite loss counts as increased, so that a search always ends. ``loss_at``
    returns the loss of the whole job at θ_t − c·d, ``base_loss`` is that at θ_t, and c is in steps.

    Source: Kalra et al. 2026 (arXiv 2601.16979), with bisection to a relative width instead of a fixed count.
    """
    low, high, factor, used = 0.0, math.inf, start, 0

    def bracketed() -> bool:
        return low > 0.0 and high < math.inf

    while used < max_forwards and not (bracketed() and high - low <= CRITICAL_TOLERANCE * high):
        used += 1
        if loss_at(factor) <= base_loss:
            low = factor
        else:
            high = factor
        factor = 0.5 * (low + high) if bracketed() else factor * (2.0 if low else 0.5)
    if not bracketed():
        return CriticalStep(math.nan, math.nan, used, True)
    width = high - low
    return CriticalStep(factor, width / (low + high), used, width > CRITICAL_TOLERANCE * high)
