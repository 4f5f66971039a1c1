"""Thresholds on the largest eigenvalue of the Hessian above which the step of an optimizer is unstable.

On the quadratic ½ a θ² every optimizer here is a linear recursion of two terms, stable while the roots z of its
characteristic polynomial lie inside the unit circle. As a grows from 0, one root leaves through z = −1: each step
overshoots by more than the one before. The threshold is the a at which z = −1 is a root.
"""

import math

from lightning_curvature.arguments import Rule, checked, not_negative

_LR = not_negative("pass the learning rate of the step")
_DECAY = Rule("from 1 on no step is stable", least=0.0, below=1.0)
_NONE = not_negative("pass 0 for none")
_CORRECTION = Rule("it is 1 − beta1 ** step", above=0.0, most=1.0)
_DAMPENING = Rule("0 is none")


@checked(lr=_LR, momentum=_DECAY, dampening=_DAMPENING, weight_decay=_NONE)
def momentum_threshold(
    lr: float, momentum: float = 0.0, *, dampening: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0
) -> float:
    r"""Return the eigenvalue of the Hessian at which gradient descent with momentum turns unstable.

    .. math:: \frac{2}{\eta}, \qquad \frac{2 + 2\beta}{(1 - \tau)\,\eta}, \qquad
        \frac{2 + 2\beta}{(1 + 2\beta)\,\eta}, \qquad \text{each minus } \lambda

    for gradient descent, heavy-ball momentum β with dampening τ, and Nesterov momentum, as in ``torch.optim.SGD``.
    Weight decay λ in the gradient adds λ to every eigenvalue.

    Derivation, with a the eigenvalue plus λ: b ← βb + (1−τ)aθ, θ ← θ − ηb has the characteristic polynomial
    (z−1)(z−β) + (1−τ)ηaz; at z = −1: 2(1+β) = (1−τ)ηa.
    Nesterov's b ← βb + aθ, θ ← θ − η(aθ + βb) has (z−1)(z−β) + ηa((1+β)z − β); at z = −1: 2(1+β) = (1+2β)ηa.

    Args:
        lr: learning rate η ≥ 0.
        momentum: β in [0, 1).
        dampening: τ < 1; without momentum it has no effect.
        nesterov: whether the momentum is Nesterov's.
        weight_decay: λ ≥ 0.

    Returns:
        The threshold, in units of 1/η; infinite at η = 0, negative if weight decay alone is unstable.

    Raises:
        ValueError: for values outside these ranges, or Nesterov momentum with dampening.

    Source: Cohen et al. 2021 (arXiv 2103.00065) for τ = 0, λ = 0.

    Example:
        >>> momentum_threshold(lr=0.1), round(momentum_threshold(lr=0.1, momentum=0.9), 9)
        (20.0, 38.0)
    """
    if nesterov and dampening != 0.0:
        raise ValueError(
            f"dampening must be 0 with Nesterov momentum, got {dampening}: torch.optim.SGD refuses it too."
        )
    if momentum == 0.0:
        dampening = 0.0  # torch keeps no buffer then
    if not dampening < 1.0:
        raise ValueError(f"dampening must be below 1, got {dampening}: no gradient would reach the parameters.")
    gain = 1.0 + 2.0 * momentum if nesterov else 1.0 - dampening
    return (2.0 + 2.0 * momentum) / (gain * lr) - weight_decay if lr else math.inf


@checked(lr=_LR, momentum=_DECAY, dampening=_DAMPENING)
def sharpness_plateaus(
    lr: float, momentum: float = 0.0, *, dampening: float = 0.0, nesterov: bool = False
) -> tuple[float, float]:
    r"""Return where batch sharpness settles in training with small mini-batches, and with large ones.

    .. math:: \frac{2 - 2\beta}{(1 - \tau)\,\eta} \quad\text{and}\quad \frac{2 + 2\beta}{(1 - \tau)\,\eta},
        \qquad \text{with Nesterov momentum}\quad \frac{2 - 2\beta}{\eta} \quad\text{and}\quad
        \frac{2 + 2\beta}{(1 + 2\beta)\,\eta}

    Both are 2/η without momentum.

    Derivation: they are the ends of :func:`mean_square_index`, which is 1 where σ²/λ is the first one and λ vanishes,
    and where λ is the second one (:func:`momentum_threshold`) and σ² vanishes.

    Arguments and errors as for :func:`momentum_threshold`, without weight decay.

    Returns:
        Both values, in units of 1/η; infinite at η = 0.

    Source: Andreyev et al. 2026 (arXiv 2604.14108), for the heavy ball.

    Example:
        >>> [round(value, 9) for value in sharpness_plateaus(lr=0.1, momentum=0.9)]
        [2.0, 38.0]
    """
    large = momentum_threshold(lr, momentum, dampening=dampening, nesterov=nesterov)
    gain = 1.0 - dampening if momentum else 1.0  # torch dampens nothing without momentum
    return (2.0 - 2.0 * momentum) / (gain * lr) if lr else math.inf, large


@checked(lr=_LR, beta1=_DECAY, decoupled_weight_decay=_NONE, bias_correction=_CORRECTION)
def adaptive_threshold(
    lr: float, beta1: float = 0.0, *, decoupled_weight_decay: float = 0.0, bias_correction: float = 1.0
) -> float:
    r"""Return the eigenvalue of the preconditioned Hessian at which Adam and its variants turn unstable.

    .. math:: \frac{(2 - \eta\lambda)(1 + \beta_1)\, c}{(1 - \beta_1)\,\eta}, \quad
        \text{simply } \frac{2 + 2\beta_1}{(1 - \beta_1)\,\eta} \text{ for } \lambda = 0,\ c = 1,

    on :math:`\lambda_{\max}(P^{-1/2} H P^{-1/2})` for a constant preconditioner P. The first moment is a moving
    average, which multiplies the gain of a heavy ball by 1−β₁. The momentum of RMSprop is a heavy ball of g/P: its
    threshold is :func:`momentum_threshold`, on the same matrix.

    Derivation, with a the eigenvalue: m ← β₁m + (1−β₁)aθ, θ ← (1−ηλ)θ − (η/c)m has the characteristic polynomial
    (z−1+ηλ)(z−β₁) + (1−β₁)(η/c)az; at z = −1: (2−ηλ)(1+β₁) = (1−β₁)(η/c)a.

    Args:
        lr: learning rate η ≥ 0.
        beta1: β₁ in [0, 1), decay of the first moment.
        decoupled_weight_decay: λ ≥ 0 of AdamW.
        bias_correction: c = 1 − β₁ᵗ of the first moment, in (0, 1]; 1 once t is large.

    Return value and errors as for :func:`momentum_threshold`.

    Source: Cohen et al. 2022 (arXiv 2207.14484) for λ = 0, c = 1.

    Example:
        >>> round(adaptive_threshold(lr=0.1, beta1=0.9), 9)  # 38/η
        380.0
    """
    if not lr:
        return math.inf
    return (2.0 - lr * decoupled_weight_decay) * (1.0 + beta1) * bias_correction / ((1.0 - beta1) * lr)
