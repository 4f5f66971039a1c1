"""Output distributions: the KL divergence between two sets of outputs, and its second-order form.

Legend: ``P`` positions (samples, tokens, pixels), ``C`` components of one output vector, ``z`` outputs (P, C),
``δ`` a change of the outputs (P, C), ``w`` the weight of a position (P,). Sources are cited by name: see
docs/references.md.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_curvature.arguments import Rule, checked, shaped
from lightning_curvature.functional.positions import position_means

Likelihood = Literal["categorical", "gaussian", "bernoulli"]
LIKELIHOODS: tuple[Likelihood, ...] = ("categorical", "gaussian", "bernoulli")

LIKELIHOOD = Rule("name the one that is trained")
OUTPUTS = shaped("... C", "evaluate all outputs on the same batch")
WEIGHTS = Rule("give a mask of the positions", bools=True)
_OF_OUTPUTS = {"outputs": OUTPUTS, "likelihood": LIKELIHOOD, "weights": WEIGHTS}

# Below this |x| the series of eˣ − 1 − x is used: its first dropped term, 2xⁿ⁻¹/(n+1)! of the sum after n orders, is
# under the rounding of the type (4e-9, 5e-17), and above it the subtraction loses at most the factor |x|/(x²/2) = 20.
_SERIES_LIMIT = 0.1
_SERIES_TERMS = {torch.float32: 6, torch.float64: 10}

# Above this x the summand p·(eˣ − 1 − x) is taken as e^(log p + x) − p·(1 + x): eˣ alone overflows where the sum need
# not (p may be 0 in the type), and from here on the subtraction costs no digit.
_EXPONENT_LIMIT = 10.0
_LARGEST_SUM = 1e30


class DivergenceStatistics(NamedTuple):
    """Position-weighted means for one change of the outputs.

    Attributes:
        divergence: mean KL(p_z ‖ p_{z+δ}), nats a position.
        quadratic: mean δᵀ(∂²ℓ/∂z²)δ, which twice the divergence approaches for small δ.
        departure: mean ``|2 KL − δᵀ(∂²ℓ/∂z²)δ|``, the distance of single positions from that limit.
    """

    divergence: Tensor
    quadratic: Tensor
    departure: Tensor


def exponential_remainder(x: Tensor) -> Tensor:
    """Return eˣ − 1 − x to full relative accuracy, also where it is much smaller than x.

    The KL divergence is log E[eˣ] with E[x] = 0. In a sum of ``expm1(x)`` the first-order terms cancel only up to
    their rounding, 6e-8·|x| in float32 beside a value of x²/2; without them nothing cancels.
    """
    return torch.where(x.abs() < _SERIES_LIMIT, _remainder_series(x), torch.expm1(x).sub_(x))


def _remainder_series(x: Tensor) -> Tensor:
    orders = _SERIES_TERMS.get(x.dtype, 10)
    series = x / orders
    for order in range(orders - 1, 2, -1):
        series.add_(1.0).mul_(x).div_(order)
    return series.add_(1.0).mul_(x).mul_(x).div_(2.0)


def check_outputs(likelihood: str, outputs: Tensor) -> None:
    """Raise ValueError unless the likelihood can have outputs of that shape."""
    if likelihood == "categorical" and (outputs.ndim < 2 or outputs.shape[-1] < 2):
        raise ValueError(
            f"outputs must hold at least two components for 'categorical', got shape {tuple(outputs.shape)}: use "
            "'bernoulli' for a single logit."
        )


def centred(p: Tensor, delta: Tensor) -> Tensor:
    """Return δ − E_p[δ]."""
    # Relative to the likeliest outcome: there δ − E[δ] is a sum over the others, whose p can all be below the rounding
    # of this outcome's δ. Subtracting E[δ] from that δ would leave nothing of a confident row.
    delta = delta - delta.gather(-1, p.argmax(-1, keepdim=True))
    return delta - (p * delta).sum(-1, keepdim=True)


def _quadratic_rows(z: Tensor, delta: Tensor, likelihood: str) -> Tensor:
    """Return δᵀ(∂²ℓ/∂z²)δ of each position, (P,)."""
    if likelihood == "gaussian":
        return delta.square().sum(-1)
    if likelihood == "bernoulli":
        return (z.sigmoid() * (-z).sigmoid() * delta.square()).sum(-1)
    p = z.softmax(-1)
    return (p * centred(p, delta).square()).sum(-1)


def _divergence_rows(z: Tensor, delta: Tensor, likelihood: str) -> tuple[Tensor, Tensor]:
    """Return KL(p_z ‖ p_{z+δ}) and δᵀ(∂²ℓ/∂z²)δ of each position, both (P,)."""
    if likelihood == "gaussian":
        square = delta.square().sum(-1)
        return 0.5 * square, square
    if likelihood == "bernoulli":
        # Bernoulli is categorical over the logits (z, 0).
        two_outcomes = (torch.stack([t, torch.zeros_like(t)], -1) for t in (z, delta))
        divergence, variance = _categorical_divergence(*two_outcomes)
        return divergence.sum(-1), variance.sum(-1)
    return _categorical_divergence(z, delta)


def _categorical_divergence(z: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL and the variance of δ over the last dimension."""
    p = z.softmax(-1)
    x = centred(p, delta)
    variance = (p * x.square()).sum(-1)
    if not bool((x.abs().amax(-1) >= _SERIES_LIMIT).any()):  # a small step: no exponential
        return torch.log1p((p * _remainder_series(x)).sum(-1)), variance
    if not bool((x > _EXPONENT_LIMIT).any()):
        return torch.log1p((p * exponential_remainder(x)).sum(-1)), variance
    exponent = z.log_softmax(-1) + x
    terms = torch.where(
        x > _EXPONENT_LIMIT, exponent.exp() - p * (1.0 + x), p * exponential_remainder(x.clamp_max(_EXPONENT_LIMIT))
    )
    total = terms.sum(-1)
    # Where even the sum overflows its logarithm, log E[eˣ], is taken term by term; some log1p overflow before that.
    return torch.where(total < _LARGEST_SUM, torch.log1p(total), exponent.logsumexp(-1)), variance


@checked(shifted_outputs=OUTPUTS, **_OF_OUTPUTS)
def divergence_statistics(
    outputs: Tensor, shifted_outputs: Tensor, likelihood: Likelihood = "categorical", weights: Tensor | None = None
) -> DivergenceStatistics:
    r"""Return the KL divergence from the distribution at ``outputs`` to that at ``shifted_outputs``, and its limit.

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

    Source: Directional curvature (2026), eq. 7.

    Example:
        >>> statistics = divergence_statistics(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.1, 0.0]]))
        >>> round(2 * statistics.divergence.item(), 6), round(statistics.quadratic.item(), 6)
        (0.001936, 0.001966)
    """
    check_outputs(likelihood, outputs)

    def statistics(z: Tensor, shifted: Tensor) -> tuple[Tensor, ...]:
        divergence, quadratic = _divergence_rows(z, shifted - z, likelihood)
        return divergence, quadratic, (2.0 * divergence - quadratic).abs()

    return DivergenceStatistics(*position_means(statistics, weights, outputs, shifted_outputs).unbind())


@checked(shifted_outputs=OUTPUTS, **_OF_OUTPUTS)
def kl_divergence(
    outputs: Tensor, shifted_outputs: Tensor, likelihood: Likelihood = "categorical", weights: Tensor | None = None
) -> Tensor:
    """Return the mean KL divergence in nats a position; arguments and errors as in :func:`divergence_statistics`.

    Example:
        >>> kl_divergence(torch.zeros(1, 3), torch.ones(1, 3), likelihood="gaussian")
        tensor(1.5000)
    """
    return divergence_statistics(outputs, shifted_outputs, likelihood, weights).divergence


@checked(change=OUTPUTS, **_OF_OUTPUTS)
def output_quadratic_form(
    outputs: Tensor, change: Tensor, likelihood: Likelihood = "categorical", weights: Tensor | None = None
) -> Tensor:
    r"""Return the mean of :math:`\delta^\top (\partial^2 \ell / \partial z^2)\, \delta` over the positions.

    With δ = J d this is dᵀGd, G the Gauss–Newton matrix. The second derivative of the loss is the covariance of the
    outcome: diag(p) − ppᵀ, the identity, or diag(p(1−p)).

    Outputs are z and ``change`` is δ, (..., C) each. Other arguments and errors as for :func:`divergence_statistics`.

    Source: Directional curvature (2026), eqs. 11-13.

    Example:
        >>> output_quadratic_form(torch.zeros(1, 2), torch.tensor([[0.2, 0.0]]))  # 0.2² · ¼
        tensor(0.0100)
    """
    check_outputs(likelihood, outputs)

    def statistics(z: Tensor, delta: Tensor) -> tuple[Tensor]:
        return (_quadratic_rows(z, delta, likelihood),)

    return position_means(statistics, weights, outputs, change)[0]


@checked(**_OF_OUTPUTS)
def output_noise_gain(outputs: Tensor, likelihood: Likelihood = "categorical", weights: Tensor | None = None) -> Tensor:
    """Return the quadratic form of independent errors as large as the outputs.

    Outputs computed with relative rounding u carry errors of about u·rms(z) a position: u² times this value is what
    they add to :func:`output_quadratic_form`. For the categorical case Var_p of independent errors of variance σ² is
    σ²(1 − Σp²). Arguments, units and errors as for :func:`output_quadratic_form`.

    Example:
        >>> output_noise_gain(torch.tensor([[3.0, 4.0]]), likelihood="gaussian")
        tensor(25.)
    """
    check_outputs(likelihood, outputs)

    def statistics(z: Tensor) -> tuple[Tensor]:
        if likelihood != "categorical":
            return (_quadratic_rows(z, z, likelihood),)
        return ((1.0 - z.softmax(-1).square().sum(-1)).clamp_min(0.0) * z.square().mean(-1),)

    return position_means(statistics, weights, outputs)[0]
