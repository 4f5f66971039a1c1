"""The line search for the step length at which the loss would first rise."""

from collections.abc import Callable
from dataclasses import dataclass


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


# The bracket is halved until its width is this fraction of its upper end.
CRITICAL_TOLERANCE = 1.0 / 16.0


def critical_step(loss_at: Callable[[float], float], base_loss: float, start: float, max_forwards: int) -> CriticalStep:
    """Find the step length at which the loss first exceeds its value at θ_t.

    From ``start`` (the last value) doubling while the loss has not increased, or halving while it has; then
    bisection. A NaN or infinite loss counts as increased, so that a search always ends.

    Args:
        loss_at: loss over the whole job at θ_t − c·d.
        base_loss: loss at θ_t.
        start: first c to try, in steps.
        max_forwards: cap on evaluations.

    Source: Kalra et al. 2026 (arXiv 2601.16979), with bisection to a relative width instead of a fixed count.
    """
    used = 0

    def increased(factor: float) -> bool:
        nonlocal used
        used += 1
        return not loss_at(factor) <= base_loss

    low, high = 0.0, float("inf")
    factor = start
    while used < max_forwards and (low == 0.0 or high == float("inf")):
        if increased(factor):
            high, factor = factor, factor / 2.0
        else:
            low, factor = factor, factor * 2.0
    if low == 0.0 or high == float("inf"):
        return CriticalStep(float("nan"), float("nan"), used, True)
    while used < max_forwards and high - low > CRITICAL_TOLERANCE * high:
        middle = 0.5 * (low + high)
        low, high = (low, middle) if increased(middle) else (middle, high)
    width = high - low
    return CriticalStep(0.5 * (low + high), width / (low + high), used, width > CRITICAL_TOLERANCE * high)
