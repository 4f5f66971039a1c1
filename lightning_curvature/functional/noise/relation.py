"""How a noise covariance relates to a Hessian: power law, commutativity, alignment, rank correlation."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_curvature.functional.line_fit import fit_line

# A line through two points has no error.
FEWEST_POINTS = 3


class PowerLaw(NamedTuple):
    """A power law C_ii = c · H_ii^γ.

    Attributes:
        exponent: γ.
        standard_error: of γ, from the scatter about the line, as if the points were independent.
        log_factor: log c.
        points: number of points that were fitted.
        lowest: the smallest H_ii among them.
        highest: the largest.
    """

    exponent: float
    standard_error: float
    log_factor: float
    points: int
    lowest: float
    highest: float


def power_law(curvatures: Tensor, variances: Tensor, floor: float = 0.0) -> PowerLaw:
    r"""Fit :math:`\log C_{ii} = \gamma \log H_{ii} + \log c` by least squares, over positive entries.

    Args:
        curvatures: H_ii, (𝒩,).
        variances: C_ii, (𝒩,).
        floor: leave out H_ii that are not above it: those that are nothing but rounding.

    Raises:
        ValueError: if both are not of one length, fewer than three pairs are left, or their H_ii are all the same.

    Source: P2, eq. 18; theory has 1 ≤ γ ≤ 2 near a minimum (eq. 20).

    Example:
        >>> round(power_law(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([3.0, 6.0, 12.0])).exponent, 9)
        1.0
    """
    _require_alike("curvatures", curvatures, "variances", variances)
    x, y = curvatures.detach().double(), variances.detach().double()
    used = (x > max(floor, 0.0)) & (y > 0.0) & x.isfinite() & y.isfinite()
    count = int(used.sum())
    if count < FEWEST_POINTS:
        raise ValueError(
            f"curvatures and variances must both be positive in at least {FEWEST_POINTS} directions for a power law, "
            f"got {count} of {len(x)}: measure on more samples, or later in training, when curvature is positive."
        )
    x, y = x[used], y[used]
    line = fit_line(x.log(), y.log())
    if math.isnan(line.slope):
        raise ValueError(f"curvatures must differ for a power law, got {count} times {float(x[0])}: take more of them.")
    return PowerLaw(line.slope, line.standard_error, line.intercept, count, float(x.min()), float(x.max()))


def commutativity_error(covariance: Tensor, hessian: Tensor) -> float:
    r"""Return how far two symmetric matrices are from commuting.

    .. math:: \frac{\lVert CH - HC\rVert_F}{\lVert C\rVert_F \lVert H\rVert_F}

    0 for matrices with common eigenvectors, at most √2. Matrices of a few large eigenvalues that have nothing to do
    with each other come out at about √(2/D), others below; :func:`random_commutativity_error` has the number. P2's
    "≈ 1.4 for random matrices" belongs to another scale, :func:`relative_commutativity_error`.

    Args:
        covariance: C, (D, D).
        hessian: H, (D, D).

    Returns:
        NaN where one of them is zero.

    Raises:
        ValueError: if they are not of one shape.

    Source: P2, section 2.2 and figure 4(b).

    Example:
        >>> c, h = torch.diag(torch.tensor([1.0, 0.0])), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> round(commutativity_error(c, h), 6)  # [[0, 1], [−1, 0]]
        1.0
    """
    _require_alike("covariance", covariance, "hessian", hessian)
    c, h = covariance.double(), hessian.double()
    scale = float(c.norm()) * float(h.norm())
    product = c @ h
    return float((product - product.mT).norm()) / scale if scale else math.nan


def relative_commutativity_error(covariance: Tensor, hessian: Tensor) -> float:
    r"""Return :math:`\lVert CH - HC\rVert_F / \lVert CH\rVert_F`.

    Near √2 for unrelated matrices of a few large eigenvalues, at most 2.

    Args:
        covariance: C, (D, D).
        hessian: H, (D, D).

    Returns:
        NaN where CH = 0.

    Raises:
        ValueError: if they are not of one shape.

    Source: P2, figure 4(b).

    Example:
        >>> c, h = torch.diag(torch.tensor([1.0, 0.0])), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> round(relative_commutativity_error(c, h), 6)  # CH = [[0, 1], [0, 0]]
        1.414214
    """
    _require_alike("covariance", covariance, "hessian", hessian)
    product = covariance.double() @ hessian.double()
    scale = float(product.norm())
    return float((product - product.mT).norm()) / scale if scale else math.nan


def random_commutativity_error(covariance: Tensor, hessian: Tensor, relative: bool = False) -> float:
    r"""Return the root mean square of :func:`commutativity_error` over all rotations of C's eigenvectors.

    With :math:`\lVert CH-HC\rVert_F^2 = 2 \operatorname{tr} C^2H^2 - 2 \operatorname{tr} CHCH`, both means over the
    Haar measure of the orthogonal group are known from the traces of C, C², H and H² (moments of second and fourth
    order of the entries of a random orthogonal matrix), so that nothing is sampled.

    Args:
        covariance: C, (D, D).
        hessian: H, (D, D).
        relative: on the scale of :func:`relative_commutativity_error`: root mean square of the numerator over that of
            the denominator.

    Returns:
        NaN where one of them is zero; 0 for D = 1.

    Raises:
        ValueError: if they are not of one shape.

    Example:
        >>> matrix = torch.diag(torch.tensor([1.0, -1.0]))
        >>> round(random_commutativity_error(matrix, matrix), 6)
        1.0
    """
    _require_alike("covariance", covariance, "hessian", hessian)
    c, h = covariance.double(), hessian.double()
    size = len(c)
    c1, h1 = float(c.trace()), float(h.trace())
    c2, h2 = float(c.square().sum()), float(h.square().sum())
    if not c2 or not h2:
        return math.nan
    if size == 1:
        return 0.0
    # Index pairings of E[Q Q Q Q]: (D + 1) where rows and columns pair alike, −1 where they do not.
    alike = c2 * h1**2 + c2 * h2 + c1**2 * h2
    unlike = 2.0 * c2 * h2 + c2 * (h1**2 + h2) + c1**2 * (h1**2 + h2)
    alternating = ((size + 1) * alike - unlike) / (size * (size - 1) * (size + 2))
    straight = c2 * h2 / size
    return math.sqrt(max(2.0 * straight - 2.0 * alternating, 0.0) / (straight if relative else c2 * h2))


def eigen_alignment(covariance: Tensor) -> float:
    r"""Return which share of the energy of C, in the eigenbasis of H, lies on its diagonal.

    .. math:: \frac{\sum_i C_{ii}^2}{\sum_{ij} C_{ij}^2}

    Args:
        covariance: C in the eigenbasis, (𝒩, 𝒩).

    Returns:
        1 where C is diagonal there; NaN where it is zero.

    Source: P2, figure 4(c).

    Example:
        >>> eigen_alignment(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
        1.0
    """
    energy = float(covariance.double().square().sum())
    return float(covariance.diagonal().double().square().sum()) / energy if energy else math.nan


def spearman_correlation(a: Tensor, b: Tensor) -> float:
    """Return the rank correlation of two sequences; ties get their mean rank.

    Args:
        a: (𝒩,).
        b: (𝒩,).

    Returns:
        NaN where one of them is constant or holds a NaN, which has no rank.

    Raises:
        ValueError: if both are not of one length.

    Source: P2, figure 4(d).

    Example:
        >>> spearman_correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 8.0, 27.0]))
        1.0
    """
    _require_alike("a", a, "b", b)
    if bool(a.isnan().any()) or bool(b.isnan().any()):
        return math.nan
    x, y = _ranks(a), _ranks(b)
    x, y = x - x.mean(), y - y.mean()
    scale = float(x.square().sum()) * float(y.square().sum())
    return float(x @ y) / math.sqrt(scale) if scale else math.nan


def _require_alike(name: str, one: Tensor, other_name: str, other: Tensor) -> None:
    if one.shape != other.shape:
        raise ValueError(
            f"{name} and {other_name} must have one shape, got {tuple(one.shape)} and {tuple(other.shape)}: give both "
            "of the same directions."
        )


def _ranks(values: Tensor) -> Tensor:
    """Ranks, float64; equal values share the mean of theirs."""
    _, group, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - 0.5 * (counts - 1))[group]
