r"""The coupling of the eigendirections of the Hessian by the noise, and the coupling that chance gives.

M is the number of spikes of C. Zhang, Yang and Tu (2026) read it off the spectrum; here it is the participation ratio
(tr C)²/tr C², which is M for M equal spikes and makes their derivation (eqs. 32–40) hold for any spectrum.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_curvature.arguments import MANY, MEASURED, Rule, checked, sentence, shaped, whole

_SQUARE = shaped("D D", "give a square matrix")
# NaN is that of C = 0.
_SPIKES = Rule(
    "effective_spikes(C) counts them", above=0.0, below=math.inf, finite=False, phrase="be positive and finite"
)
_DIRECTIONS = Rule("take as many as R has")


@checked(covariance=_SQUARE)
def coupling_matrix(covariance: Tensor) -> Tensor:
    r"""Return :math:`R_{ij} = C_{ij} / \sqrt{|C_{ii} C_{jj}|}`, (𝒩, 𝒩) float64, for C in the eigenbasis of H.

    Rows and columns whose diagonal entry is 0 are NaN.

    Source: Zhang, Yang and Tu (2026), eq. 6.

    Example:
        >>> coupling_matrix(torch.tensor([[4.0, 1.0], [1.0, 1.0]]))
        tensor([[1.0000, 0.5000],
                [0.5000, 1.0000]], dtype=torch.float64)
    """
    c = covariance.double()
    scale = c.diagonal().abs().sqrt()
    scale = torch.where(scale > 0.0, scale, torch.nan)
    return c / scale / scale[:, None]


@checked(coupling=_SQUARE)
def mean_coupling(coupling: Tensor) -> float:
    r"""Return :math:`\mu = \operatorname{mean}_{i \ne j} |R_{ij}|` of R, (𝒩, 𝒩).

    Entries that are NaN are left out; μ is NaN if all are.

    Source: Zhang, Yang and Tu (2026), eq. 7.

    Example:
        >>> mean_coupling(torch.tensor([[1.0, -0.5], [-0.5, 1.0]]))
        0.5
    """
    off = ~torch.eye(len(coupling), dtype=torch.bool, device=coupling.device)
    values = coupling[off].double().abs()
    return float(values[~values.isnan()].mean()) if bool((~values.isnan()).any()) else math.nan


@checked(coupling=_SQUARE)
def leading_couplings(coupling: Tensor) -> Tensor:
    r"""Return μ of R, (𝒩, 𝒩), in its first 1, 2, …, 𝒩 directions, (𝒩,) float64: all of :func:`mean_coupling` at once.

    Entries that are NaN are left out; μ is NaN where all are, as for one direction.

    Example:
        >>> leading_couplings(torch.tensor([[1.0, -0.5, 0.1], [-0.5, 1.0, 0.0], [0.1, 0.0, 1.0]]))
        tensor([   nan, 0.5000, 0.2000], dtype=torch.float64)
    """
    values = coupling.double().abs().fill_diagonal_(torch.nan)
    used = ~values.isnan()
    sums, counts = (t.cumsum(0).cumsum(1).diagonal() for t in (torch.where(used, values, 0.0), used.double()))
    return sums / counts


@checked(covariance=_SQUARE)
def effective_spikes(covariance: Tensor) -> float:
    r"""Return the participation ratio of the spectrum, :math:`M = (\operatorname{tr} C)^2 / \operatorname{tr} C^2`.

    C is (D, D), in any basis. M lies between 1 and D for a positive semidefinite C, and is NaN for C = 0.

    Example:
        >>> effective_spikes(torch.diag(torch.tensor([2.0, 2.0, 2.0, 0.0])))
        3.0
    """
    c = covariance.double()
    energy = float(c.square().sum())
    return float(c.trace()) ** 2 / energy if energy else math.nan


@checked(spikes=_SPIKES)
def random_coupling(spikes: float) -> float:
    r"""Return the expected μ for a C of M spikes that is independent of H, :math:`\sqrt{2/\pi} / \sqrt M`.

    Valid for 1 ≪ M ≪ D, where the diagonal of a rotated C hardly scatters; elsewhere take :func:`haar_coupling`.

    Raises:
        ValueError: if M is not positive.

    Source: Zhang, Yang and Tu (2026), eq. 40.

    Example:
        >>> round(random_coupling(20.0), 4)
        0.1784
    """
    return math.sqrt(2.0 / math.pi / spikes)


class CouplingTest(NamedTuple):
    """The observed coupling against chance.

    Attributes:
        baseline: μ₀, expected by chance.
        standard_error: SE.
        z: (μ − μ₀) / SE.
        p: one-sided, P(Z ≤ z); 0 if too small for a float.
        log10_p: decimal logarithm of p, finite also where p is 0.
    """

    baseline: float
    standard_error: float
    z: float
    p: float
    log10_p: float


@checked(coupling=MEASURED, spikes=_SPIKES, directions=whole(2, "one direction has none to couple to"))
def coupling_test(coupling: float, spikes: float, directions: int) -> CouplingTest:
    r"""Return a test of whether μ of R, (𝒩, 𝒩), is below the expectation by chance for M spikes.

    .. math:: Z = \frac{\mu - \mu_0}{SE}, \qquad \mu_0 = \sqrt{\frac{2}{\pi M}}, \qquad
        SE = \frac1{\mathcal N} \sqrt{\frac{1 - 2/\pi}{M}}

    Z compares runs; it is no probability. SE falls with 𝒩, while μ₀ has a relative error of about 1/(4M) − M/(2D) at
    every 𝒩, and SE assumes independent entries of R, which holds for equal spikes only: for C rotated at random,
    D = 𝒩 = 400, Z was between −87 and 68. :func:`haar_coupling` gives the true mean and scatter.

    Raises:
        ValueError: if M, ``spikes``, is not positive, or 𝒩, ``directions``, is below 2.

    Source: Zhang, Yang and Tu (2026), eqs. 42–46.

    Example:
        >>> round(coupling_test(0.066, 20.0, 2560).z)  # eq. 50 of the source has −3378, by a slip
        -2135
    """
    baseline = random_coupling(spikes)
    error = math.sqrt((1.0 - 2.0 / math.pi) / spikes) / directions
    z = (coupling - baseline) / error
    log_p = float(torch.special.log_ndtr(torch.tensor(z, dtype=torch.float64)))
    return CouplingTest(baseline, error, z, math.exp(log_p), log_p / math.log(10.0))


@checked(covariance=_SQUARE, directions=_DIRECTIONS)
def haar_rotated(covariance: Tensor, directions: int, generator: torch.Generator | None = None) -> Tensor:
    """Return C, (D, D), with its eigenvectors rotated at random, in the first 𝒩 of the new directions.

    It is (𝒩, 𝒩) float64, with the law of the leading block of QΛQᵀ for Haar-distributed Q, which ``generator`` draws on
    the device of C.

    Raises:
        ValueError: if 𝒩 is not between 1 and D.

    Source: Zhang, Yang and Tu (2026), section 2.2 and eq. 29.

    Example:
        >>> haar_rotated(torch.eye(5), 3).round(decimals=9).abs()  # no rotation changes the identity
        tensor([[1., 0., 0.],
                [0., 1., 0.],
                [0., 0., 1.]], dtype=torch.float64)
    """
    c = covariance.double()
    if not 1 <= directions <= len(c):
        raise sentence("directions", f"be between 1 and D = {len(c)}", directions, _DIRECTIONS.remedy)
    normal = torch.randn(len(c), directions, dtype=c.dtype, device=c.device, generator=generator)
    q, r = torch.linalg.qr(normal)
    # The factor with a positive diagonal is unique and therefore Haar-distributed.
    q = q * r.diagonal().sign()
    return q.mT @ c @ q


@checked(covariance=_SQUARE, directions=_DIRECTIONS, draws=whole(1, "4 show the scatter", MANY))
def haar_coupling(covariance: Tensor, directions: int, draws: int, generator: torch.Generator | None = None) -> Tensor:
    """Return μ of C after each of ``draws`` random rotations, (draws,) float64.

    Other arguments and errors as for :func:`haar_rotated`.

    Example:
        >>> haar_coupling(torch.diag(torch.tensor([1.0, 0.0, 0.0])), 3, draws=2).round(decimals=9)  # rank one: |R| = 1
        tensor([1., 1.], dtype=torch.float64)
    """
    rotated = (haar_rotated(covariance, directions, generator) for _ in range(draws))
    return torch.tensor([mean_coupling(coupling_matrix(c)) for c in rotated], dtype=torch.float64)
