"""Means over mini-batches: a ratio of two means with its standard error, and its value at other batch sizes.

Legend: ``x``, ``y`` numerator and denominator of one draw, ``n`` draws or samples, ``b`` samples of a mini-batch B;
g, H gradient and Hessian of the loss of all samples, g_B the gradient of a mini-batch, Σ the covariance of the
gradients of single samples (divisor n).

*Moments* sum up the draws in a float64 tensor (6,): n, mean x, mean y, Sxx, Sxy, Syy, where S are sums of products of
deviations from the means. They begin as zeros. Sources are cited by name: see docs/references.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_curvature.arguments import Rule, check_broadcast, check_fields, checked, shaped, whole

Scalar = Tensor | float
_MOMENTS = shaped("... 6", "begin with torch.zeros(6, dtype=torch.float64)")
_BATCH_SIZE, _SAMPLES = Rule("count the samples of a mini-batch", least=1), whole(1, "count the samples")
# One size or several, or none.
BATCH_SIZES = Rule("count the samples of a mini-batch", least=1, empty=True)


@checked(moments=shaped("6"))
def add_to_moments(moments: Tensor, numerator: Scalar, denominator: Scalar = 1.0) -> Tensor:
    r"""Return the moments with one draw added, or with several, (m,) each.

    .. math:: \bar x' = \bar x + \frac{x - \bar x}{n + 1}, \qquad
        S_{xy}' = S_{xy} + \frac{n}{n + 1} (x - \bar x)(y - \bar y)

    Equal draws, one after the other, leave S at exactly 0. A denominator of 1 makes the ratio a plain mean of x.

    Source: Welford 1962.

    Example:
        >>> moments = torch.zeros(6, dtype=torch.float64)
        >>> for value in (1.0, 3.0):
        ...     moments = add_to_moments(moments, value)
        >>> moments.tolist()
        [2.0, 2.0, 1.0, 2.0, 0.0, 0.0]
    """
    x, y = (torch.as_tensor(v, dtype=moments.dtype, device=moments.device) for v in (numerator, denominator))
    check_broadcast("denominator", y, "numerator", x)
    x, y = torch.broadcast_tensors(x, y)
    draws = torch.stack([x.reshape(-1), y.reshape(-1)])
    count = draws.shape[1]
    if not count:
        return moments
    means = draws.mean(1)
    deviations = draws - means.unsqueeze(1)
    (xx, xy), (_, yy) = deviations @ deviations.mT
    added = torch.cat([means.new_tensor([count]), means, torch.stack([xx, xy, yy])])
    return merge_moments(torch.stack([moments, added]))


@checked(stacked=shaped("sets! 6", "stack sets of moments"))
def merge_moments(stacked: Tensor) -> Tensor:
    r"""Return the moments of the union of several sets of draws.

    .. math:: S_{xy} = S^a_{xy} + S^b_{xy} + \frac{n_a n_b}{n_a + n_b} (\bar x_b - \bar x_a)(\bar y_b - \bar y_a)

    ``stacked`` is (sets, 6), with zeros for a set without draws. Sets are merged one after the other, which gives the
    same bits for the same order: one sum over all of them rounds the mean of equal numbers.

    Source: Chan, Golub and LeVeque 1983.

    Example:
        >>> one, three = (add_to_moments(torch.zeros(6, dtype=torch.float64), value) for value in (1.0, 3.0))
        >>> merge_moments(torch.stack([one, three])).tolist()
        [2.0, 2.0, 1.0, 2.0, 0.0, 0.0]
    """
    merged = stacked[0]
    for added in stacked[1:]:
        count = merged[0] + added[0]
        share = added[0] / count.clamp(min=1.0)
        deviations = added[1:3] - merged[1:3]
        x, y = deviations.unbind()
        # The weight is multiplied in first: 0 before the first draw, which would else overflow where the draw is large.
        weighted_x, weighted_y = (merged[0] * share * deviations).unbind()
        products = torch.stack([weighted_x * x, weighted_x * y, weighted_y * y])
        merged = torch.cat([count.reshape(1), merged[1:3] + share * deviations, merged[3:] + added[3:] + products])
    return merged


@checked(moments=_MOMENTS)
def ratio_of_means(moments: Tensor) -> Tensor:
    r"""Return :math:`r = \bar x / \bar y`, (…) float64, from moments (…, 6).

    The bias as an estimate of E x / E y is of order 1/n, below the standard error's 1/√n. The ratio is NaN without
    draws, and where ȳ ≤ 0: denominators estimate a positive number (a squared norm, the descent of an update), and
    noise hides it there.

    Example:
        >>> ratio_of_means(torch.tensor([2.0, 6.0, 3.0, 0.0, 0.0, 0.0], dtype=torch.float64))
        tensor(2., dtype=torch.float64)
    """
    _, x, y, *_ = moments.unbind(-1)
    return torch.where(y > 0.0, x / y, torch.nan)


@checked(moments=_MOMENTS)
def ratio_standard_error(moments: Tensor) -> Tensor:
    r"""Return the standard error of the ratio of means over independent draws, to first order (delta method).

    .. math:: \frac{1}{\bar y} \sqrt{\frac{1}{n (n-1)} \sum_i (x_i - r y_i)^2}
        = \frac{1}{\bar y} \sqrt{\frac{S_{xx} - 2 r S_{xy} + r^2 S_{yy}}{n (n-1)}}

    With y = 1 it is the standard error of a mean. Equal draws give exactly 0; if x is proportional to y, the terms
    cancel down to a rounding of 1e-8 of the spread of x. Shapes as for :func:`ratio_of_means`; NaN for fewer than two
    draws, and where the ratio is NaN.

    Source: Cochran 1977, section 6.4.

    Example:
        >>> ratio_standard_error(torch.tensor([2.0, 2.0, 1.0, 2.0, 0.0, 0.0], dtype=torch.float64))  # of 1 and 3
        tensor(1., dtype=torch.float64)
    """
    n, _, y, xx, xy, yy = moments.unbind(-1)
    ratio = ratio_of_means(moments)
    # Rounding can make the sum negative; clamp keeps NaN.
    squares = (xx + ratio * (ratio * yy - 2.0 * xy)).clamp(min=0.0)
    return torch.where(n > 1.0, (squares / (n * (n - 1.0))).sqrt() / y, torch.nan)


@checked(batch_size=_BATCH_SIZE, samples=_SAMPLES)
def batch_factor(batch_size: float, samples: int, replacement: bool = False) -> float:
    r"""Return the variance of the mean of b samples, in units of the variance of one sample.

    .. math:: \frac{1}{b} \text{ with replacement}, \qquad \frac{n - b}{b\,(n - 1)} \text{ without}

    Args:
        batch_size: b; for several sizes their harmonic mean, since both factors are linear in 1/b.
        samples: n.
        replacement: whether a batch can hold a sample twice.

    Raises:
        ValueError: if b is below 1, or above n without replacement.

    Source: Cochran 1977, theorem 2.2.

    Example:
        >>> batch_factor(2, 5, replacement=True), batch_factor(2, 5), batch_factor(5, 5)
        (0.5, 0.375, 0.0)
    """
    if not replacement and batch_size > samples:
        raise ValueError(
            f"batch_size must not be above the number of samples, {samples}, got {batch_size}: larger batches need "
            "replacement=True."
        )
    if replacement:
        return 1.0 / batch_size
    return (samples - batch_size) / (batch_size * (samples - 1)) if batch_size < samples else 0.0


@dataclass(frozen=True)
class NoiseTerms:
    r"""Contributions of gradient and noise to GNI and IAS, which give both for every batch size.

    .. math:: E_B[g_B^\top H g_B] = g^\top H g + f_b \operatorname{tr}(H\Sigma), \qquad
        E_B\lVert g_B\rVert^2 = \lVert g\rVert^2 + f_b \operatorname{tr}\Sigma

    with f_b the :func:`batch_factor`.

    Attributes:
        gradient_curvature: gᵀHg.
        noise_curvature: tr(HΣ).
        gradient_square: ‖g‖².
        noise_square: tr Σ.
        samples: n.

    Source: the covariance of a mean of b samples (Cochran 1977, theorem 2.2) in the definitions of Edge of stochastic
    stability (2025), eq. 1 and appendix C.

    Example:
        >>> terms = NoiseTerms(1.0, 2.0, 0.5, 4.0, samples=3)
        >>> terms.gni([1, 3]), terms.ias([1, 3])
        (tensor([6., 2.], dtype=torch.float64), tensor([0.6667, 2.0000], dtype=torch.float64))
    """

    gradient_curvature: float
    noise_curvature: float
    gradient_square: float
    noise_square: float
    samples: int

    def __post_init__(self) -> None:
        check_fields(self, samples=_SAMPLES)

    @classmethod
    @checked(batch_size=_BATCH_SIZE, samples=_SAMPLES)
    def from_batches(
        cls,
        *,
        batch_curvature: float,
        batch_square: float,
        gradient_curvature: float,
        gradient_square: float,
        batch_size: float,
        samples: int,
        replacement: bool = False,
    ) -> "NoiseTerms":
        """Return the terms from E_B[g_BᵀHg_B] and E_B‖g_B‖², ``batch_curvature`` and ``batch_square``, at one size b.

        Other arguments as for :func:`batch_factor` and the class.

        Raises:
            ValueError: for a batch size out of range, or batches of all samples, which have no noise.
        """
        factor = batch_factor(batch_size, samples, replacement)
        if factor == 0.0:
            raise ValueError(
                f"batch_size must be below the number of samples, got {batch_size} of {samples}: batches of all "
                "samples have no noise to measure."
            )
        return cls(
            gradient_curvature,
            (batch_curvature - gradient_curvature) / factor,
            gradient_square,
            (batch_square - gradient_square) / factor,
            samples,
        )

    @checked(batch_size=BATCH_SIZES)
    def gni(self, batch_size: int | Sequence[int], replacement: bool = False) -> Tensor:
        """Return GNI at one batch size, a scalar, or at several, (sizes,), float64; errors of :func:`batch_factor`."""
        factor = self._factors(batch_size, replacement)
        return (self.gradient_curvature + factor * self.noise_curvature) / self.gradient_square

    @checked(batch_size=BATCH_SIZES)
    def ias(self, batch_size: int | Sequence[int], replacement: bool = False) -> Tensor:
        """Return IAS at one batch size, a scalar, or at several, (sizes,), float64; errors of :func:`batch_factor`."""
        factor = self._factors(batch_size, replacement)
        curvature = self.gradient_curvature + factor * self.noise_curvature
        return curvature / (self.gradient_square + factor * self.noise_square)

    def _factors(self, batch_size: int | Sequence[int], replacement: bool) -> Tensor:
        if isinstance(batch_size, Sequence):
            factors = [batch_factor(size, self.samples, replacement) for size in batch_size]
            return torch.tensor(factors, dtype=torch.float64)
        return torch.tensor(batch_factor(batch_size, self.samples, replacement), dtype=torch.float64)
