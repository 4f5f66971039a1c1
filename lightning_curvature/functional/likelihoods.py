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

# Below this |x| the series of eˣ − 1 − x is used: its first dropped term, 2xⁿ⁻¹/(n+1)! of the sum after n orders, is
# under the rounding of the type (4e-9, 5e-17), and above it the subtraction loses at most the factor |x|/(x²/2) = 20.
_SERIES_LIMIT = 0.1
_SERIES_TERMS = {torch.float32: 6, torch.float64: 10}

# Above this x the summand p·(eˣ − 1 − x) is taken as e^(log p + x) − p·(1 + x): eˣ alone overflows where the sum need
# not (p may be 0 in the type), and from here on the subtraction costs no digit.
_EXPONENT_LIMIT = 10.0
_LARGEST_SUM = 1e30


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
    orders = _SERIES_TERMS.get(x.dtype, 10)
    series = x / orders
    for order in range(orders - 1, 2, -1):
        series.add_(1.0).mul_(x).div_(order)
    series.add_(1.0).mul_(x).mul_(x).div_(2.0)
    return torch.where(x.abs() < _SERIES_LIMIT, series, torch.expm1(x).sub_(x))


def check_likelihood(likelihood: str) -> None:
    """Raise ValueError for an unknown likelihood."""
    if likelihood not in LIKELIHOODS:
        raise ValueError(f"likelihood must be one of {LIKELIHOODS}, got {likelihood!r}: name the one that is trained.")


def _check(likelihood: str, outputs: Tensor | None = None) -> None:
    check_likelihood(likelihood)
    if likelihood == "categorical" and outputs is not None and (outputs.ndim < 2 or outputs.shape[-1] < 2):
        raise ValueError(
            f"outputs must hold at least two components for 'categorical', got shape {tuple(outputs.shape)}: use "
            "'bernoulli' for a single logit."
        )


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


def _two_outcomes(z: Tensor) -> Tensor:
    """Logits of the two outcomes of each component, (P, C, 2): Bernoulli is categorical over (z, 0)."""
    return torch.stack([z, torch.zeros_like(z)], -1)


def _centred(p: Tensor, delta: Tensor) -> Tensor:
    """δ − E_p[δ]."""
    # Seen from the likeliest outcome: there δ − E[δ] is a sum over the others, whose p may all be below the rounding
    # of its own δ. Subtracting E[δ] from it would leave nothing of a confident row.
    delta = delta - delta.gather(-1, p.argmax(-1, keepdim=True))
    return delta - (p * delta).sum(-1, keepdim=True)


def _quadratic_rows(z: Tensor, delta: Tensor, likelihood: str) -> Tensor:
    """δᵀ(∂²ℓ/∂z²)δ of each position, (P,)."""
    if likelihood == "gaussian":
        return delta.square().sum(-1)
    if likelihood == "bernoulli":
        return (z.sigmoid() * (-z).sigmoid() * delta.square()).sum(-1)
    p = z.softmax(-1)
    return (p * _centred(p, delta).square()).sum(-1)


def _divergence_rows(z: Tensor, delta: Tensor, likelihood: str) -> tuple[Tensor, Tensor]:
    """KL(p_z ‖ p_{z+δ}) and δᵀ(∂²ℓ/∂z²)δ of each position, both (P,)."""
    if likelihood == "gaussian":
        square = delta.square().sum(-1)
        return 0.5 * square, square
    if likelihood == "bernoulli":
        divergence, variance = _categorical_divergence(_two_outcomes(z), _two_outcomes(delta))
        return divergence.sum(-1), variance.sum(-1)
    return _categorical_divergence(z, delta)


def _categorical_divergence(z: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """KL and variance of δ over the last dimension."""
    p = z.softmax(-1)
    x = _centred(p, delta)
    variance = (p * x.square()).sum(-1)
    if not bool((x > _EXPONENT_LIMIT).any()):
        return torch.log1p((p * exponential_remainder(x)).sum(-1)), variance
    exponent = z.log_softmax(-1) + x
    terms = torch.where(
        x > _EXPONENT_LIMIT, exponent.exp() - p * (1.0 + x), p * exponential_remainder(x.clamp_max(_EXPONENT_LIMIT))
    )
    total = terms.sum(-1)
    # Where even the sum overflows its logarithm, log E[eˣ], is taken term by term; some log1p overflow before that.
    return torch.where(total < _LARGEST_SUM, torch.log1p(total), exponent.logsumexp(-1)), variance


def _weighted(weights: Tensor, rows: Tensor) -> Tensor:
    """Weighted sum over the positions; one without weight counts for nothing, whatever it holds."""
    return weights @ torch.where(weights == 0.0, 0.0, rows)


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
        ValueError: for an unknown likelihood, shapes that do not agree, or categorical outputs of one component.

    Source: P0 (directional curvature), eq. 7.

    Example:
        >>> statistics = divergence_statistics(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.1, 0.0]]))
        >>> round(2 * statistics.divergence.item(), 6), round(statistics.quadratic.item(), 6)
        (0.001936, 0.001966)
    """
    _check(likelihood, outputs)
    z, shifted, w = _rows(outputs, shifted_outputs, weights)
    rows = max(1, _ELEMENTS_PER_PIECE // max(1, z.shape[-1]))
    totals = z.new_zeros(3)
    for piece, other, weight in zip(z.split(rows), shifted.split(rows), w.split(rows), strict=True):
        delta = other - piece
        divergence, quadratic = _divergence_rows(piece, delta, likelihood)
        departure = (2.0 * divergence - quadratic).abs()
        totals += torch.stack([_weighted(weight, rows) for rows in (divergence, quadratic, departure)])
    return DivergenceStatistics(*(totals / w.sum()).unbind())


def kl_divergence(
    outputs: Tensor,
    shifted_outputs: Tensor,
    likelihood: Likelihood = "categorical",
    weights: Tensor | None = None,
) -> Tensor:
    """Mean KL divergence in nats a position; arguments and errors as in :func:`divergence_statistics`.

    Example:
        >>> kl_divergence(torch.zeros(1, 3), torch.ones(1, 3), likelihood="gaussian")
        tensor(1.5000)
    """
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
        ValueError: for an unknown likelihood, shapes that do not agree, or categorical outputs of one component.

    Source: P0 (directional curvature), eqs. 11-13.

    Example:
        >>> output_quadratic_form(torch.zeros(1, 2), torch.tensor([[0.2, 0.0]]))  # 0.2² · ¼
        tensor(0.0100)
    """
    _check(likelihood, outputs)
    z, delta, w = _rows(outputs, change, weights)
    rows = max(1, _ELEMENTS_PER_PIECE // max(1, z.shape[-1]))
    total = z.new_zeros(())
    for piece, step, weight in zip(z.split(rows), delta.split(rows), w.split(rows), strict=True):
        total = total + _weighted(weight, _quadratic_rows(piece, step, likelihood))
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

    Example:
        >>> output_noise_gain(torch.tensor([[3.0, 4.0]]), likelihood="gaussian")
        tensor(25.)
    """
    _check(likelihood, outputs)
    z, _, w = _rows(outputs, outputs, weights)
    if likelihood == "gaussian":
        values = z.square().sum(-1)
    elif likelihood == "bernoulli":
        values = (z.sigmoid() * (-z).sigmoid() * z.square()).sum(-1)
    else:
        values = (1.0 - z.softmax(-1).square().sum(-1)).clamp_min(0.0) * z.square().mean(-1)
    return _weighted(w, values) / w.sum()
