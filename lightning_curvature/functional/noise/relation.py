"""Relations of a noise covariance to a Hessian: power law, commutativity, alignment, rank correlation."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_curvature.arguments import Rule, checked, shaped
from lightning_curvature.functional.line_fit import fit_line

# A line through two points has no error.
FEWEST_POINTS = 3

_NUMBERS = shaped("N", "give both of the same directions")
_MATRIX = shaped("D D", "give both of the same directions")


class PowerLaw(NamedTuple):
    """A power law C_ii = c · H_ii^γ.

    Attributes:
        exponent: γ.
        standard_error: of γ, from the scatter about the line, for independent points.
        log_factor: log c.
        points: number of fitted points.
        lowest: smallest fitted H_ii.
        highest: largest fitted H_ii.
    """

    exponent: float
    standard_error: float
    log_factor: float
    points: int
    lowest: float
    highest: float


@checked(curvatures=_NUMBERS, variances=_NUMBERS, floor=Rule("0.0 leaves out none that are positive"))
def power_law(curvatures: Tensor, variances: Tensor, floor: float = 0.0) -> PowerLaw:
    r"""Return the fit of :math:`\log C_{ii} = \gamma \log H_{ii} + \log c` to positive entries by least squares.

    Args:
        curvatures: H_ii, (𝒩,).
        variances: C_ii, (𝒩,).
        floor: H_ii that are not above it are rounding and left out.

    Raises:
        ValueError: if the lengths differ, fewer than three pairs remain, or their H_ii are all equal.

    Source: Zhang, Yang and Tu (2026), eq. 18; theory has 1 ≤ γ ≤ 2 near a minimum (eq. 20).

    Example:
        >>> round(power_law(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([3.0, 6.0, 12.0])).exponent, 9)
        1.0
    """
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


@checked(covariance=_MATRIX, hessian=_MATRIX)
def commutativity_error(covariance: Tensor, hessian: Tensor) -> float:
    r"""Return the commutativity error of two symmetric matrices, (D, D) each; NaN if one is zero.

    .. math:: \frac{\lVert CH - HC\rVert_F}{\lVert C\rVert_F \lVert H\rVert_F}

    It is 0 for matrices with common eigenvectors and at most √2. Unrelated matrices with a few large eigenvalues have
    about √(2/D), others less; :func:`random_commutativity_error` gives the number. "≈ 1.4 for random matrices" in the
    source is on another scale, :func:`relative_commutativity_error`.

    Raises:
        ValueError: if the shapes differ.

    Source: Zhang, Yang and Tu (2026), section 2.2 and figure 4(b).

    Example:
        >>> c, h = torch.diag(torch.tensor([1.0, 0.0])), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> round(commutativity_error(c, h), 6)  # [[0, 1], [−1, 0]]
        1.0
    """
    scale = float(covariance.double().norm()) * float(hessian.double().norm())
    return float(commutator_norms(covariance, hessian)[0]) / scale if scale else math.nan


@checked(covariance=_MATRIX, hessian=_MATRIX)
def relative_commutativity_error(covariance: Tensor, hessian: Tensor) -> float:
    r"""Return :math:`\lVert CH - HC\rVert_F / \lVert CH\rVert_F`.

    It is near √2 for unrelated matrices with a few large eigenvalues, at most 2, and NaN if CH = 0. Arguments and
    errors as for :func:`commutativity_error`.

    Source: Zhang, Yang and Tu (2026), figure 4(b).

    Example:
        >>> c, h = torch.diag(torch.tensor([1.0, 0.0])), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> round(relative_commutativity_error(c, h), 6)  # CH = [[0, 1], [0, 0]]
        1.414214
    """
    difference, scale = commutator_norms(covariance, hessian).tolist()
    return difference / scale if scale else math.nan


@checked(covariance=_MATRIX, hessian=_MATRIX)
def commutator_norms(covariance: Tensor, hessian: Tensor) -> Tensor:
    r"""Return :math:`\lVert CH - HC\rVert_F` and :math:`\lVert CH\rVert_F`, (2,) float64, by one product.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> c, h = torch.diag(torch.tensor([1.0, 0.0])), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> commutator_norms(c, h)  # [[0, 1], [−1, 0]] and [[0, 1], [0, 0]]
        tensor([1.4142, 1.0000], dtype=torch.float64)
    """
    product = covariance.double() @ hessian.double()
    return torch.stack([(product - product.mT).norm(), product.norm()])


@checked(covariance=_MATRIX, hessian=_MATRIX)
def random_commutativity_error(covariance: Tensor, hessian: Tensor, relative: bool = False) -> float:
    r"""Return the root mean square of :func:`commutativity_error` over all rotations of C's eigenvectors.

    The means of both traces in :math:`\lVert CH-HC\rVert_F^2 = 2 \operatorname{tr} C^2H^2 - 2 \operatorname{tr} CHCH`
    over the Haar measure of the orthogonal group follow from the traces of C, C², H and H², by the second and fourth
    moments of the entries of a random orthogonal matrix: nothing is sampled. It is 0 for D = 1.

    With ``relative`` the scale is that of :func:`relative_commutativity_error`: root mean square of the numerator over
    that of the denominator. Other arguments and errors as for :func:`commutativity_error`.

    Example:
        >>> matrix = torch.diag(torch.tensor([1.0, -1.0]))
        >>> round(random_commutativity_error(matrix, matrix), 6)
        1.0
    """
    c, h = covariance.double(), hessian.double()
    size = len(c)
    c1, h1 = float(c.trace()), float(h.trace())
    c2, h2 = float(c.square().sum()), float(h.square().sum())
    if not c2 or not h2:
        return math.nan
    if size == 1:
        return 0.0
    # Index pairings of E[Q Q Q Q]: (D + 1) where rows and columns have the same pairing, −1 where they differ.
    same = c2 * h1**2 + c2 * h2 + c1**2 * h2
    other = 2.0 * c2 * h2 + c2 * (h1**2 + h2) + c1**2 * (h1**2 + h2)
    alternating = ((size + 1) * same - other) / (size * (size - 1) * (size + 2))
    straight = c2 * h2 / size
    return math.sqrt(max(2.0 * straight - 2.0 * alternating, 0.0) / (straight if relative else c2 * h2))


@checked(covariance=shaped("D D", "give a square matrix"))
def eigen_alignment(covariance: Tensor) -> float:
    r"""Return the share of the energy of C, (𝒩, 𝒩) in the eigenbasis of H, on its diagonal.

    .. math:: \frac{\sum_i C_{ii}^2}{\sum_{ij} C_{ij}^2}

    It is 1 for a diagonal C, and NaN if C is zero.

    Source: Zhang, Yang and Tu (2026), figure 4(c).

    Example:
        >>> eigen_alignment(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
        1.0
    """
    energy = float(covariance.double().square().sum())
    return float(covariance.diagonal().double().square().sum()) / energy if energy else math.nan


@checked(a=_NUMBERS, b=_NUMBERS)
def spearman_correlation(a: Tensor, b: Tensor) -> float:
    """Return the rank correlation of two sequences, (𝒩,) each; ties share their mean rank.

    It is NaN if a sequence is constant or holds a NaN, which has no rank.

    Raises:
        ValueError: if the lengths differ.

    Source: Zhang, Yang and Tu (2026), figure 4(d).

    Example:
        >>> spearman_correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 8.0, 27.0]))
        1.0
    """
    if bool(a.isnan().any()) or bool(b.isnan().any()):
        return math.nan
    # torchmetrics' spearman_corrcoef ranks in float32, adds 1e-6 to the denominator, and refuses integers.
    x, y = _ranks(a), _ranks(b)
    x, y = x - x.mean(), y - y.mean()
    scale = float(x.square().sum()) * float(y.square().sum())
    return float(x @ y) / math.sqrt(scale) if scale else math.nan


def _ranks(values: Tensor) -> Tensor:
    """Return ranks, float64; equal values share their mean rank."""
    _, group, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - 0.5 * (counts - 1))[group]
