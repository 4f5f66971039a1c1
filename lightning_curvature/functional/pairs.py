"""What the outputs at two mirrored points tell: second-order form, its truncation, the softmax's share of it.

Legend: ``P`` positions, ``C`` components, ``z`` outputs at θ (P, C), ``z_±`` outputs at θ ± εd,
``δ = ½(z_+ − z_−)`` (odd orders of ε only), ``m = ½(z_+ + z_−) − z`` (even orders only).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_curvature.functional.likelihoods import (
    _ELEMENTS_PER_PIECE,
    Likelihood,
    _centred,
    _check,
    _rows,
    _weighted,
)


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


def pair_statistics(
    outputs: Tensor,
    outputs_plus: Tensor,
    outputs_minus: Tensor,
    likelihood: Likelihood = "categorical",
    weights: Tensor | None = None,
) -> PairStatistics:
    """Evaluate :class:`PairStatistics` in one pass over the outputs.

    Args:
        outputs: ``z``, shape (..., C).
        outputs_plus: ``z_+``, same shape.
        outputs_minus: ``z_−``, same shape.
        likelihood: "categorical", "gaussian" or "bernoulli".
        weights: weight of each position, shape (...); default 1 each.

    Returns:
        Four scalars, NaN when no position has weight.

    Raises:
        ValueError: for an unknown likelihood or shapes that do not agree.

    Example:
        >>> z = torch.zeros(1, 2)
        >>> change = torch.tensor([[0.1, -0.1]])
        >>> round(pair_statistics(z, z + change, z - change).signal.item(), 6)  # Var(±0.1)
        0.01
    """
    _check(likelihood, outputs)
    z, plus, w = _rows(outputs, outputs_plus, weights)
    _, minus, _ = _rows(outputs, outputs_minus, weights)
    rows = max(1, _ELEMENTS_PER_PIECE // max(1, z.shape[-1]))
    totals = z.new_zeros(4)
    pieces = zip(z.split(rows), plus.split(rows), minus.split(rows), w.split(rows), strict=True)
    for base, up, down, weight in pieces:
        # Differences first: near convergence z is large and its changes are small.
        up, down = up - base, down - base
        found = _statistics(base, 0.5 * (up - down), 0.5 * (up + down), likelihood)
        totals += torch.stack([_weighted(weight, values) for values in found])
    return PairStatistics(*(totals / w.sum()).unbind())


def _statistics(z: Tensor, delta: Tensor, mean: Tensor, likelihood: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four of each position, (P,)."""
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
    delta, mean = _centred(p, delta), _centred(p, mean)
    square = delta.square()
    weighted = p * square
    variance = weighted.sum(-1)
    fourth = (weighted * square).sum(-1) - 3.0 * variance.square()
    return variance, (p * mean.square()).sum(-1), (weighted * delta).sum(-1), fourth
