"""Curvature along a step: ratios of the second-order to the first-order change of the loss.

Legend: d = θ_t − θ_{t+1} = η Δθ the step taken, g and H gradient and Hessian of the loss at θ_t, ε a distance in steps:
θ_t − ε d is θ_{t+1} at ε = 1.

Sources are cited by name: see docs/references.md.
"""

import torch
from torch import Tensor

from lightning_curvature.arguments import checked, not_negative, positive
from lightning_curvature.functional.likelihoods import (
    LIKELIHOOD,
    OUTPUTS,
    WEIGHTS,
    Likelihood,
    kl_divergence,
    output_quadratic_form,
)

Scalar = Tensor | float

EPSILON = positive("1.0 is the length of the step")
# NaN where a step was not recorded, whose curvature is NaN, too.
LR = not_negative("pass the learning rate of the step", finite=False)
SCALE = positive("1.0 is the mean over the positions")
FACTOR = not_negative("pass η_c/η", finite=False)
_OF_OUTPUTS = {"outputs": OUTPUTS, "likelihood": LIKELIHOOD, "weights": WEIGHTS, "scale": SCALE}


def _tensor(value: Scalar, like: Scalar | None = None) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if isinstance(like, Tensor):
        return torch.as_tensor(value, dtype=like.dtype, device=like.device)
    return torch.as_tensor(value, dtype=torch.get_default_dtype())


def _double(value: Scalar) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64)


@checked(lr=LR)
def directional_curvature(quadratic: Scalar, descent: Scalar, lr: Scalar = 1.0) -> Tensor:
    r"""Return the directional curvature along the true update.

    .. math:: \lambda_{\text{dir}} = \frac{\Delta\theta^\top H \Delta\theta}{g^\top \Delta\theta}
        = \frac{1}{\eta} \frac{d^\top H d}{g^\top d}

    Args:
        quadratic: dᵀHd (or dᵀGd), scalar, units of the loss.
        descent: gᵀd, scalar, units of the loss.
        lr: η of the step; 1 gives the unit-free s = ηλ, whose edge is 2.

    Returns:
        λ, in units of 1/η, with the edge 2/η. NaN where gᵀd ≤ 0: a step that goes uphill has no descent boundary.

    Source: Directional curvature (2026), eqs. 1 and 3.

    Example:
        >>> directional_curvature(quadratic=0.5, descent=1.0, lr=0.1)
        tensor(5.)
    """
    quadratic, descent = _tensor(quadratic, descent), _tensor(descent, quadratic)
    ratio = quadratic / (descent * lr)
    return torch.where(descent > 0, ratio, torch.nan)


@checked()
def headroom(quadratic: Scalar, descent: Scalar) -> Tensor:
    r"""Return the factor by which the step could have been longer before it stops descending, to second order.

    .. math:: \frac{2\, g^\top d}{d^\top H d} = \frac{2/\eta}{\lambda}

    It is 1 at the edge, infinite where the loss does not curve upward along the step, and NaN where gᵀd ≤ 0. Arguments
    as for :func:`directional_curvature`.

    Source: Directional curvature (2026), eqs. 2 and 3.

    Example:
        >>> headroom(quadratic=0.5, descent=1.0)  # the step could have been four times as long
        tensor(4.)
    """
    quadratic, descent = _tensor(quadratic, descent), _tensor(descent, quadratic)
    value = torch.where(quadratic > 0, 2.0 * descent / quadratic, torch.inf)
    return torch.where((descent > 0) & ~quadratic.isnan(), value, torch.nan)


@checked(epsilon=EPSILON)
def finite_difference_quadratic(loss_plus: Scalar, loss: Scalar, loss_minus: Scalar, epsilon: Scalar) -> Tensor:
    r"""Return the second difference of the loss along the step.

    .. math:: \frac{L(\theta+\epsilon d) - 2L(\theta) + L(\theta-\epsilon d)}{\epsilon^2} = d^\top H d + O(\epsilon^2)

    Args:
        loss_plus: L(θ + εd), scalar.
        loss: L(θ), scalar.
        loss_minus: L(θ − εd), scalar.
        epsilon: ε > 0, in steps.

    Returns:
        dᵀHd in float64: only the rounding of the three losses remains.

    Raises:
        ValueError: if a plain number ε is not positive.

    Source: Directional curvature (2026), eq. 4.

    Example:
        >>> finite_difference_quadratic(loss_plus=1.5, loss=1.0, loss_minus=0.75, epsilon=0.5)
        tensor(1., dtype=torch.float64)
    """
    plus, base, minus = (_double(value) for value in (loss_plus, loss, loss_minus))
    return ((plus - base) + (minus - base)) / epsilon**2


@checked(epsilon=EPSILON)
def finite_difference_descent(loss_plus: Scalar, loss_minus: Scalar, epsilon: Scalar) -> Tensor:
    r"""Return the first difference of the loss along the step.

    .. math:: [L(\theta+\epsilon d) - L(\theta-\epsilon d)] / (2\epsilon) = g^\top d + O(\epsilon^2)

    In float64; arguments and errors as for :func:`finite_difference_quadratic`.

    Example:
        >>> finite_difference_descent(loss_plus=1.5, loss_minus=0.75, epsilon=0.5)
        tensor(0.7500, dtype=torch.float64)
    """
    return (_double(loss_plus) - _double(loss_minus)) / (2.0 * epsilon)


def finite_difference_forms(
    loss_plus: Scalar, loss: Scalar, loss_minus: Scalar, epsilon: Scalar, descent: Scalar | None = None
) -> tuple[Tensor, Scalar]:
    """Return dᵀHd and gᵀd from a pair of losses; a ``descent`` that is given takes the place of the latter."""
    if descent is None:
        descent = finite_difference_descent(loss_plus, loss_minus, epsilon)
    return finite_difference_quadratic(loss_plus, loss, loss_minus, epsilon), descent


@checked(epsilon=EPSILON, lr=LR)
def finite_difference_curvature(
    loss_plus: Scalar,
    loss: Scalar,
    loss_minus: Scalar,
    epsilon: Scalar,
    lr: Scalar = 1.0,
    descent: Scalar | None = None,
) -> Tensor:
    r"""Return the symmetric finite-difference estimate of the directional curvature, from two extra forwards.

    .. math:: \lambda_{\text{FD}} =
        \frac{L(\theta+\epsilon\Delta\theta) - 2L(\theta) + L(\theta-\epsilon\Delta\theta)}
             {\epsilon^2\, g^\top \Delta\theta}

    with ε counted here in steps (εd in place of εΔθ). Losses, ε and errors as for :func:`finite_difference_quadratic`,
    ``lr`` and units as for :func:`directional_curvature`; ``descent`` is gᵀd, by default the first difference of the
    same pair.

    Source: Directional curvature (2026), eq. 5.

    Example:
        >>> finite_difference_curvature(loss_plus=1.5, loss=1.0, loss_minus=0.75, epsilon=0.5, lr=0.1)
        tensor(13.3333, dtype=torch.float64)
    """
    return directional_curvature(*finite_difference_forms(loss_plus, loss, loss_minus, epsilon, descent), lr)


@checked(epsilon=EPSILON)
def divergence_quadratic(divergence: Tensor, epsilon: Scalar, scale: float = 1.0) -> Tensor:
    """Return 2 · scale · KL/ε² = dᵀFd + O(ε) in the type of the divergence."""
    return 2.0 * scale * divergence / epsilon**2


@checked(shifted_outputs=OUTPUTS, epsilon=EPSILON, lr=LR, **_OF_OUTPUTS)
def kl_curvature(
    outputs: Tensor,
    shifted_outputs: Tensor,
    epsilon: Scalar,
    descent: Scalar,
    lr: Scalar = 1.0,
    likelihood: Likelihood = "categorical",
    weights: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    r"""Return the KL estimate of the curvature, from one extra forward.

    .. math:: \lambda_{\text{KL}} =
        \frac{2\,\mathbb E_x\,\mathrm{KL}(p_\theta \| p_{\theta-\epsilon\Delta\theta})}{\epsilon^2\, g^\top\Delta\theta}
        = \frac{\Delta\theta^\top F \Delta\theta}{g^\top \Delta\theta} + O(\epsilon)

    Args:
        outputs: outputs at θ, shape (..., C).
        shifted_outputs: outputs at θ − εd, same shape.
        epsilon: ε > 0, in steps.
        descent: gᵀd, scalar.
        lr: η of the step; 1 gives the unit-free s = ηλ, whose edge is 2.
        likelihood: "categorical", "gaussian" or "bernoulli".
        weights: weight of each position, shape (...).
        scale: the loss as a multiple of the mean negative log-likelihood of a position; ``mse_loss`` with its mean
            reduction over (P, C) is 2/C times the Gaussian one.

    Returns:
        λ_KL, in units of 1/η; NaN where gᵀd ≤ 0.

    Raises:
        ValueError: if a plain number ε is not positive, for an unknown likelihood or shapes that do not agree.

    Source: Directional curvature (2026), eq. 8.

    Example:
        >>> z, shifted = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.1, 0.0]])
        >>> kl_curvature(z, shifted, epsilon=1.0, descent=0.01)  # 2 KL = 0.1² p(1 − p) + …
        tensor(0.1936)
    """
    divergence = kl_divergence(outputs, shifted_outputs, likelihood, weights)
    return directional_curvature(divergence_quadratic(divergence, epsilon, scale), descent, lr)


@checked(tangent=OUTPUTS, lr=LR, **_OF_OUTPUTS)
def gauss_newton_curvature(
    outputs: Tensor,
    tangent: Tensor,
    descent: Scalar,
    lr: Scalar = 1.0,
    likelihood: Likelihood = "categorical",
    weights: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    r"""Return the Gauss–Newton curvature from one forward-mode product, without ε.

    .. math:: \lambda_{\text{GN}} = \frac{\Delta\theta^\top G \Delta\theta}{g^\top \Delta\theta}, \quad
        d^\top G d = \mathbb E_x\, u^\top (\partial^2\ell/\partial z^2)\, u, \quad u = J d

    ``tangent`` is u, of the shape of the outputs. Other arguments, units and errors as for :func:`kl_curvature`.

    Source: Directional curvature (2026), eqs. 11-13.

    Example:
        >>> z, tangent = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.1, 0.0]])
        >>> gauss_newton_curvature(z, tangent, descent=0.01)  # 0.1² p(1 − p)
        tensor(0.1966)
    """
    return directional_curvature(scale * output_quadratic_form(outputs, tangent, likelihood, weights), descent, lr)


@checked(critical_factor=FACTOR, lr=LR)
def critical_sharpness(critical_factor: Scalar, lr: Scalar = 1.0) -> Tensor:
    r"""Return the critical sharpness :math:`2/\eta_c`, whose edge is 2/η; from η_c on the step raises the loss.

    Args:
        critical_factor: η_c/η, the length at which L(θ − c·d) first exceeds L(θ), in steps.
        lr: η of the step.

    Source: Kalra et al. 2026 (arXiv 2601.16979).

    Example:
        >>> critical_sharpness(critical_factor=4.0, lr=0.1)
        tensor(5.)
    """
    return 2.0 / (_tensor(critical_factor) * lr)
