"""Output distributions: the KL divergence between two sets of outputs, and its second-order form.

Legend: ``P`` positions (samples, tokens, pixels), ``C`` components of one output vector, ``z`` outputs (P, C),
``δ`` a change of the outputs (P, C), ``w`` the weight of a position (P,).
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Likelihood = Literal["categorical", "gaussian", "bernoulli"]
LIKELIHOODS: tuple[Likelihood, ...] = ("categorical", "gaussian", "bernoulli")

# Rows are worked on in pieces of this many numbers, so that the temporaries of a large vocabulary stay bounded
# (64 MiB each in float32) however many tokens a batch holds.
_ELEMENTS_PER_PIECE = 2**24

# Below this |x| the series of eˣ − 1 − x is used: its first dropped term is under the rounding of the type, and
# above it the subtraction loses at most the factor |x| / (x²/2) = 20.
_SERIES_LIMIT = 0.1
_SERIES_TERMS = {torch.float32: 5, torch.float64: 10}


class DivergenceStatistics(NamedTuple):
    """Position-weighted means that belong to one change of the outputs.

    Attributes:
        divergence: mean KL(p_z ‖ p_{z+δ}), nats a position.
        quadratic: mean δᵀ(∂²ℓ/∂z²)δ, which twice the divergence approaches for small δ.
        departure: mean |2 KL − δᵀ(∂²ℓ/∂z²)δ|, how far single positions are from that limit.
    """

    divergence: Tensor
    quadratic: Tensor
    departure: Tensor


def exponential_remainder(x: Tensor) -> Tensor:
    """Return eˣ − 1 − x to full relative accuracy, also where it is much smaller than x.

    The KL divergence is log E[eˣ] with E[x] = 0. Summed as ``expm1(x)`` the first-order terms cancel only up to
    their own rounding, 6e-8·|x| in float32 beside a value of x²/2; without them nothing is left to cancel.
    """
    series = torch.zeros_like(x)
    for order in range(_SERIES_TERMS.get(x.dtype, 10), 2, -1):
        series = (series + 1.0) * x / order
    series = (series + 1.0) * x * x / 2.0
    return torch.where(x.abs() < _SERIES_LIMIT, series, torch.expm1(x) - x)


def _check(likelihood: str) -> None:
    if likelihood not in LIKELIHOODS:
        raise ValueError(f"likelihood must be one of {LIKELIHOODS}, got {likelihood!r}: name the one that is trained.")


def _rows(outputs: Tensor, other: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Bring outputs, change and weights to (P, C), (P, C), (P,) in at least float32."""
    if outputs.shape != other.shape:
        raise ValueError(
            f"outputs and the values compared with them must have one shape, got {tuple(outputs.shape)} and "
            f"{tuple(other.shape)}: evaluate both on the same batch."
        )
    components = outputs.shape[-1] if outputs.ndim > 1 else 1
    dtype = torch.promote_types(outputs.dtype, torch.float32)
    z = outputs.detach().reshape(-1, components).to(dtype)
    other = other.detach().reshape(-1, components).to(dtype)
    if weights is None:
        return z, other, z.new_ones(z.shape[0])
    if weights.numel() != z.shape[0]:
        raise ValueError(
            f"weights must have one value for each of the {z.shape[0]} positions, got {weights.numel()}: give a mask "
            "of the outputs' shape without its last dimension."
        )
    return z, other, weights.detach().reshape(-1).to(dtype)


def _probabilities(z: Tensor, likelihood: str) -> Tensor:
    """Mean of the outcome given the outputs: softmax, sigmoid, or the outputs themselves."""
    if likelihood == "categorical":
        return z.softmax(-1)
    return z.sigmoid() if likelihood == "bernoulli" else z


def _centred(p: Tensor, delta: Tensor) -> Tensor:
    return delta - (p * delta).sum(-1, keepdim=True)


def _quadratic_rows(p: Tensor, delta: Tensor, likelihood: str) -> Tensor:
    """δᵀ(∂²ℓ/∂z²)δ of each position, (P,)."""
    if likelihood == "categorical":
        return (p * _centred(p, delta).square()).sum(-1)
    if likelihood == "bernoulli":
        return (p * (1.0 - p) * delta.square()).sum(-1)
    return delta.square().sum(-1)


def _divergence_rows(p: Tensor, delta: Tensor, likelihood: str) -> Tensor:
    """KL(p_z ‖ p_{z+δ}) of each position, (P,)."""
    if likelihood == "categorical":
        return torch.log1p((p * exponential_remainder(_centred(p, delta))).sum(-1))
    if likelihood == "bernoulli":
        # log E[e^{δ b}] over b ~ Bernoulli(p), less its mean p δ: the two outcomes have centred values δ(1−p), −δp.
        remainder = p * exponential_remainder(delta * (1.0 - p)) + (1.0 - p) * exponential_remainder(-delta * p)
        return torch.log1p(remainder).sum(-1)
    return 0.5 * delta.square().sum(-1)


def divergence_statistics(
    outputs: Tensor,
    shifted_outputs: Tensor,
    likelihood: Likelihood = "categorical",
    weights: Tensor | None = None,
) -> DivergenceStatistics:
    r"""KL divergence from the distribution at ``outputs`` to that at ``shifted_outputs``, with its quadratic form.

    .. math:: \mathrm{KL}(p_z \| p_{z+\delta}) = \log \mathbb E_{p_z}[e^{\delta_c}], \quad
        \delta_c = \delta - \mathbb E_{p_z}[\delta],

    summed as :math:`\log(1 + \mathbb E[e^{\delta_c} - 1 - \delta_c])`, in which nothing cancels. Gaussian with unit
    variance: ½‖δ‖². Bernoulli: the same sum over two outcomes, for each component.

    Args:
        outputs: logits or means ``z``, shape (..., C), or (P,) for one component a position.
        shifted_outputs: ``z + δ``, same shape.
        likelihood: "categorical" (softmax over the last dimension), "gaussian" or "bernoulli".
        weights: weight of each position, shape (...); 0 leaves a position out. Default: 1 each.

    Returns:
        Position-weighted means, scalars in nats; NaN when no position has weight.

    Raises:
        ValueError: for an unknown likelihood or shapes that do not agree.

    Source: P0 (directional curvature), eq. 7.
    """
    _check(likelihood)
    z, shifted, w = _rows(outputs, shifted_outputs, weights)
    rows = max(1, _ELEMENTS_PER_PIECE // max(1, z.shape[-1]))
    totals = z.new_zeros(3)
    for piece, other, weight in zip(z.split(rows), shifted.split(rows), w.split(rows), strict=True):
        p, delta = _probabilities(piece, likelihood), other - piece
        divergence, quadratic = _divergence_rows(p, delta, likelihood), _quadratic_rows(p, delta, likelihood)
        departure = (2.0 * divergence - quadratic).abs()
        totals += torch.stack([weight @ divergence, weight @ quadratic, weight @ departure])
    return DivergenceStatistics(*(totals / w.sum()).unbind())


def kl_divergence(
    outputs: Tensor,
    shifted_outputs: Tensor,
    likelihood: Likelihood = "categorical",
    weights: Tensor | None = None,
) -> Tensor:
    """Mean KL divergence in nats a position; arguments and errors as in :func:`divergence_statistics`."""
    return divergence_statistics(outputs, shifted_outputs, likelihood, weights).divergence


def output_quadratic_form(
    outputs: Tensor,
    change: Tensor,
    likelihood: Likelihood = "categorical",
    weights: Tensor | None = None,
) -> Tensor:
    r"""Mean of :math:`\delta^\top (\partial^2 \ell / \partial z^2)\, \delta` over the positions.

    With δ = J d this is dᵀGd, G the Gauss–Newton matrix; the loss's second derivative is the covariance of the
    outcome: diag(p) − ppᵀ, the identity, or diag(p(1−p)).

    Args:
        outputs: ``z``, shape (..., C).
        change: ``δ``, same shape.
        likelihood: as in :func:`divergence_statistics`.
        weights: as in :func:`divergence_statistics`.

    Returns:
        A scalar.

    Raises:
        ValueError: for an unknown likelihood or shapes that do not agree.

    Source: P0 (directional curvature), eqs. 11-13.
    """
    _check(likelihood)
    z, delta, w = _rows(outputs, change, weights)
    rows = max(1, _ELEMENTS_PER_PIECE // max(1, z.shape[-1]))
    total = z.new_zeros(())
    for piece, step, weight in zip(z.split(rows), delta.split(rows), w.split(rows), strict=True):
        total = total + weight @ _quadratic_rows(_probabilities(piece, likelihood), step, likelihood)
    return total / w.sum()


def output_noise_gain(outputs: Tensor, likelihood: Likelihood = "categorical", weights: Tensor | None = None) -> Tensor:
    """Quadratic form of independent errors as large as the outputs themselves.

    Outputs computed with relative rounding u carry errors of about u·rms(z) a position; times u² this is what
    :func:`output_quadratic_form` sees of them. For the categorical case Var_p of independent errors of variance σ²
    is σ²(1 − Σp²).

    Args:
        outputs: ``z``, shape (..., C).
        likelihood: as in :func:`divergence_statistics`.
        weights: as in :func:`divergence_statistics`.

    Returns:
        A scalar in the units of :func:`output_quadratic_form`.
    """
    _check(likelihood)
    z, _, w = _rows(outputs, outputs, weights)
    if likelihood == "gaussian":
        values = z.square().sum(-1)
    elif likelihood == "bernoulli":
        p = z.sigmoid()
        values = (p * (1.0 - p) * z.square()).sum(-1)
    else:
        values = (1.0 - z.softmax(-1).square().sum(-1)).clamp_min(0.0) * z.square().mean(-1)
    return w @ values / w.sum()
