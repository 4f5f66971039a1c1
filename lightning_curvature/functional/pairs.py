"""Statistics of the outputs at θ ± εd: second-order form, its truncation error, the softmax's share of that error.

Legend: ``P`` positions, ``C`` components, ``z`` outputs at θ (P, C), ``z_±`` outputs at θ ± εd,
``δ = ½(z_+ − z_−)`` (odd orders of ε only), ``m = ½(z_+ + z_−) − z`` (even orders only).
"""

from typing import NamedTuple

from torch import Tensor

from lightning_curvature.arguments import checked
from lightning_curvature.functional.likelihoods import LIKELIHOOD, OUTPUTS, WEIGHTS, Likelihood, centred, check_outputs
from lightning_curvature.functional.positions import position_means


class PairStatistics(NamedTuple):
    """Position-weighted means, with S = ∂²ℓ/∂z² and κ₃, κ₄ the cumulants of δ under the outcome's distribution.

    Attributes:
        signal: δᵀSδ = ε² dᵀGd + O(ε⁴).
        defect: mᵀSm = O(ε⁴): curvature of the outputs, and their rounding.
        third: κ₃; half the difference of the losses at ±δ departs from the tangent by κ₃/6.
        fourth: κ₄; the loss's second difference along δ is δᵀSδ + κ₄/12.
    """

    signal: Tensor
    defect: Tensor
    third: Tensor
    fourth: Tensor


@checked(outputs=OUTPUTS, outputs_plus=OUTPUTS, outputs_minus=OUTPUTS, likelihood=LIKELIHOOD, weights=WEIGHTS)
def pair_statistics(
    outputs: Tensor,
    outputs_plus: Tensor,
    outputs_minus: Tensor,
    likelihood: Likelihood = "categorical",
    weights: Tensor | None = None,
) -> PairStatistics:
    """Return :class:`PairStatistics`, four scalars, in one pass over z, z_+ and z_−, shape (..., C) each.

    They are NaN when no position has weight. Other arguments and errors as for
    :func:`~lightning_curvature.functional.divergence_statistics`.

    Example:
        >>> import torch
        >>> z = torch.zeros(1, 2)
        >>> change = torch.tensor([[0.1, -0.1]])
        >>> round(pair_statistics(z, z + change, z - change).signal.item(), 6)  # Var(±0.1)
        0.01
    """
    check_outputs(likelihood, outputs)

    def statistics(z: Tensor, plus: Tensor, minus: Tensor) -> tuple[Tensor, ...]:
        # Differences first: near convergence z is large and its changes are small.
        plus, minus = plus - z, minus - z
        return _statistics(z, 0.5 * (plus - minus), 0.5 * (plus + minus), likelihood)

    return PairStatistics(*position_means(statistics, weights, outputs, outputs_plus, outputs_minus).unbind())


def _statistics(z: Tensor, delta: Tensor, mean: Tensor, likelihood: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four statistics of each position, (P,)."""
    square = delta.square()
    if likelihood == "gaussian":
        zero = z.new_zeros(z.shape[0])
        return square.sum(-1), mean.square().sum(-1), zero, zero
    if likelihood == "bernoulli":
        p = z.sigmoid()
        spread = p * (-z).sigmoid()
        third = (spread * (1.0 - 2.0 * p) * square * delta).sum(-1)
        fourth = (spread * (1.0 - 6.0 * spread) * square.square()).sum(-1)
        return (spread * square).sum(-1), (spread * mean.square()).sum(-1), third, fourth
    p = z.softmax(-1)
    delta, mean = centred(p, delta), centred(p, mean)
    square = delta.square()
    weighted = p * square
    variance = weighted.sum(-1)
    fourth = (weighted * square).sum(-1) - 3.0 * variance.square()
    return variance, (p * mean.square()).sum(-1), (weighted * delta).sum(-1), fourth
