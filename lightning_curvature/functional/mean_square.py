"""Stability in the mean square: whether mini-batch noise lets the distance from the path's mean grow."""

import math

from lightning_curvature.arguments import MEASURED, Rule, checked, not_negative
from lightning_curvature.functional.thresholds import momentum_threshold

_LR = not_negative("pass the learning rate of the step")
_VARIANCE = not_negative("pass the variance over mini-batches", finite=False)
_DECAY = Rule("from 1 on no step is stable", least=0.0, below=1.0)
_ROUNDS = 60


@checked(curvature=MEASURED, variance=_VARIANCE, lr=_LR, momentum=_DECAY)
def mean_square_index(
    curvature: float, variance: float, lr: float, momentum: float = 0.0, *, nesterov: bool = False
) -> float:
    r"""Return how near gradient descent with momentum on a random quadratic is to instability in the mean square.

    .. math:: \eta \left[\frac{\lambda}{2(1+\beta)} + \frac{\sigma^2/\lambda}{2(1-\beta)}\right]

    for θ ← θ − ηb, b ← βb + hθ with independent curvatures h of mean λ and variance σ². E[θ²] stays bounded where it is
    below 1. Its first term is the full-batch threshold; at small λ the second one is all.

    Derivation: the second moments of (θ, b) follow a linear recursion of three terms, whose matrix has the eigenvalue 1
    exactly there. With Nesterov momentum, k = 1 − ηλ and v = η²σ², it has it at
    :math:`(k^2 + v)[(1+\beta)^2 + \beta^2 - 2\beta(1+\beta)^2 k/(1+k\beta)] = 1`, not linear in η: the index is 1/f,
    f the factor of η at which that holds.

    Args:
        curvature: λ.
        variance: σ², of λ over mini-batches.
        lr: η.
        momentum: β in [0, 1), of a heavy ball or of Nesterov.
        nesterov: which of both.

    Returns:
        The index, 1 at the edge; NaN where λ ≤ 0.

    Example:
        >>> round(mean_square_index(curvature=2.0, variance=0.0, lr=1.0), 9)  # 2/η
        1.0
        >>> round(mean_square_index(curvature=0.1, variance=0.02, lr=1.0, momentum=0.9), 3)
        1.026
    """
    if not curvature > 0.0 or math.isnan(variance):
        return math.nan
    if not nesterov or momentum == 0.0:
        drift = lr * curvature / (2.0 * (1.0 + momentum))
        return drift + lr * variance / curvature / (2.0 * (1.0 - momentum))
    if lr == 0.0:
        return 0.0
    beta, low, high = momentum, 0.0, momentum_threshold(lr, momentum, nesterov=True) / curvature

    def grows(factor: float) -> bool:
        k, v = 1.0 - factor * lr * curvature, (factor * lr) ** 2 * variance
        return (k * k + v) * ((1.0 + beta) ** 2 + beta**2 - 2.0 * beta * (1.0 + beta) ** 2 * k / (1.0 + k * beta)) > 1.0

    for _ in range(_ROUNDS):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if grows(middle) else (middle, high)
    return 1.0 / high
