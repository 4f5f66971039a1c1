"""Curvature along the part of a path that flips its sign at each step.

At the edge of stability of full-batch training the component along the sharpest direction does so, while the rest of
the path changes slowly: a second difference of updates keeps the first and takes the second away.
"""

import math

from torch import Tensor

from lightning_curvature.arguments import MEASURED, checked, not_negative, shaped

# Updates that are independent of each other have −2/3: above this the path says nothing about the edge.
COSINE_LIMIT = -0.9

_UPDATE = shaped("...", "give updates of one shape")
_SQUARE = not_negative("pass sᵀPs", finite=False)
_THREE = shaped("3 ...", "stack those of three steps in a row, the last one first")


@checked(update=_UPDATE, before=_UPDATE, earlier=_UPDATE)
def oscillation(update: Tensor, before: Tensor, earlier: Tensor) -> Tensor:
    r"""Return the second difference of the last three updates.

    .. math:: s_t = d_t - 2 d_{t-1} + d_{t-2}

    A component that flips its sign at each step is in it four times, a constant one not at all.

    Args:
        update: d_t = θ_t − θ_{t+1}, any shape.
        before: d_{t−1}, the same shape.
        earlier: d_{t−2}, the same shape.

    Returns:
        s_t, in units of the parameters.

    Example:
        >>> import torch
        >>> flips, drifts = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
        >>> oscillation(flips + drifts, drifts - flips, flips + drifts)
        tensor([4., 0.])
    """
    return update - 2.0 * before + earlier


@checked(product=MEASURED, square=_SQUARE, square_before=_SQUARE)
def oscillation_cosine(product: float, square: float, square_before: float) -> float:
    r"""Return the cosine between the oscillation of two steps in a row.

    .. math:: \frac{s_t^\top P s_{t-1}}{\sqrt{s_t^\top P s_t}\, \sqrt{s_{t-1}^\top P s_{t-1}}}

    It is −1 where the path flips its sign at each step, and −2/3 in the mean for independent updates.

    Args:
        product: s_tᵀPs_{t−1}, P the optimizer's diagonal preconditioner (1 for SGD).
        square: s_tᵀPs_t.
        square_before: s_{t−1}ᵀPs_{t−1}.

    Returns:
        The cosine; NaN where one of both is zero.

    Example:
        >>> oscillation_cosine(-2.0, 1.0, 4.0)
        -1.0
    """
    length = math.sqrt(square) * math.sqrt(square_before)
    return product / length if length else math.nan


@checked(quadratic=MEASURED, square=_SQUARE, cosine=MEASURED)
def oscillation_curvature(quadratic: float, square: float, cosine: float) -> float:
    r"""Return the curvature along the oscillation.

    .. math:: \lambda_{\text{osc}} = \frac{s^\top H s}{s^\top P s} \le \lambda_{\max}(P^{-1/2} H P^{-1/2})

    At the edge of stability it reaches the optimizer's threshold; being a Rayleigh quotient it is a lower bound of the
    largest eigenvalue.

    Args:
        quadratic: sᵀHs, H of the full loss at θ_t.
        square: sᵀPs.
        cosine: that of :func:`oscillation_cosine`.

    Returns:
        λ_osc; NaN unless the cosine is below −0.9, since the path does not flip there.

    Example:
        >>> oscillation_curvature(6.0, 2.0, -0.99), oscillation_curvature(6.0, 2.0, -0.67)
        (3.0, nan)
    """
    return quadratic / square if cosine < COSINE_LIMIT and square > 0.0 else math.nan


@checked(parameters=_THREE, gradients=_THREE, diagonal=shaped("...", "give P in the shape of the parameters"))
def oscillation_secant(parameters: Tensor, gradients: Tensor, diagonal: Tensor | None = None) -> Tensor:
    r"""Return the curvature along the oscillation from gradients at hand, without a pass.

    .. math:: \frac{u^\top y}{u^\top P u}, \qquad u = \theta_t - 2\theta_{t-1} + \theta_{t-2}, \quad
        y = g_t - 2 g_{t-1} + g_{t-2}

    The gradients must be those of one loss, the full one. Across the kinks of a ReLU network it measures their slope,
    not H.

    Args:
        parameters: θ_t, θ_{t−1}, θ_{t−2}, stacked, (3, …).
        gradients: g_t, g_{t−1}, g_{t−2}, the same shape.
        diagonal: P, (…); None for 1.

    Returns:
        The secant, scalar in float64; NaN where u is zero.

    Example:
        >>> import torch
        >>> path = torch.tensor([[1.0], [-1.0], [1.0]])
        >>> oscillation_secant(path, 5.0 * path)
        tensor(5., dtype=torch.float64)
    """
    u, y = (oscillation(*(t.double() for t in three)) for three in (parameters, gradients))
    weighted = u if diagonal is None else u * diagonal
    return (u * y).sum() / (u * weighted).sum()
