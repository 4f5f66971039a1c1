r"""How much one more sample changes the loss around a point: the increment, its quadratic model and its mean powers.

Legend: L_k the mean loss of the first k samples, ℓ the loss of one more, w the point, U (N, D) an orthonormal basis of
the directions that are probed, z ~ N(0, σ²I_D) the probe, so that the loss is looked at in w + Uz. In the full space U
is the identity and D = N. The *increment* is

.. math:: f(z) = L_{k+1} - L_k = \frac{\ell - L_k}{k + 1} \approx a + c^\top z + \tfrac12 z^\top B z

and the criterion of order p is Δ_p(k+1) = E|f(z)|^p. Coefficients and values are float64.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_curvature.functional.line_fit import fit_line

Scalar = Tensor | float


def increment(sample: Tensor, mean: Tensor, k: int) -> Tensor:
    r"""Return what one more sample adds to a mean over k: of losses, of gradients, of Hessians.

    .. math:: \frac{x_{k+1} - \bar x_k}{k + 1} = \bar x_{k+1} - \bar x_k

    Exact, where the difference of two large means would lose its digits.

    Args:
        sample: x_{k+1}.
        mean: x̄_k, of a shape that broadcasts with it.
        k: number of samples in the mean.

    Raises:
        ValueError: if k is below 1.

    Source: P1, eq. 5.

    Example:
        >>> increment(torch.tensor(5.0), torch.tensor(2.0), k=2)
        tensor(1.)
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}: the mean before must hold a sample.")
    return (sample - mean) / (k + 1)


@dataclass(frozen=True)
class QuadraticIncrement:
    r"""The quadratic model of the increment in D directions; of one sample, or of several along leading dimensions.

    .. math:: q(z) = a + c^\top z + \tfrac12 z^\top B z

    Attributes:
        a: (…) the increment at w.
        c: (…, D) its gradient, U^T (∇L_{k+1} − ∇L_k). P1 leaves ∇L_k out, since its w is a minimum of L_k.
        b: (…, D, D) its Hessian, U^T (∇²L_{k+1} − ∇²L_k) U, symmetric.

    Raises:
        ValueError: if the shapes do not belong together.

    Source: P1, eqs. 7–9.

    Example:
        >>> model = QuadraticIncrement(torch.tensor(1.0), torch.tensor([1.0, 0.0]), 2.0 * torch.eye(2))
        >>> model.at(torch.tensor([[2.0, 1.0]]))  # 1 + 2 + (4 + 1)
        tensor([8.], dtype=torch.float64)
    """

    a: Tensor
    c: Tensor
    b: Tensor

    def __post_init__(self) -> None:
        for name in ("a", "c", "b"):
            object.__setattr__(self, name, getattr(self, name).double())
        dimension = self.c.shape[-1] if self.c.ndim else 0
        if self.c.shape != (*self.a.shape, dimension) or self.b.shape != (*self.a.shape, dimension, dimension):
            raise ValueError(
                "a, c and b must have shapes (…), (…, D) and (…, D, D), got "
                f"{tuple(self.a.shape)}, {tuple(self.c.shape)} and {tuple(self.b.shape)}: give one of each a sample."
            )

    @property
    def dimension(self) -> int:
        """D."""
        return self.c.shape[-1]

    def first(self, dimension: int) -> "QuadraticIncrement":
        """Return the model in the first of the D directions alone."""
        return QuadraticIncrement(self.a, self.c[..., :dimension], self.b[..., :dimension, :dimension])

    def without_value(self) -> "QuadraticIncrement":
        """Return the model of what the increment has beyond its value at w, q − a."""
        return QuadraticIncrement(torch.zeros_like(self.a), self.c, self.b)

    def at(self, z: Tensor) -> Tensor:
        """Return q at each of S probes.

        Args:
            z: (S, D).

        Returns:
            (S, …) float64.
        """
        z = z.double()
        linear = torch.einsum("sd,...d->s...", z, self.c)
        quadratic = torch.einsum("sd,...de,se->s...", z, self.b, z)
        return self.a + linear + 0.5 * quadratic


def gaussian_moment(model: QuadraticIncrement, sigma: Scalar) -> Tensor:
    r"""Return the mean square of the quadratic model under a Gaussian probe, in closed form (GM).

    .. math:: E[q(z)^2] = a^2 + a \sigma^2 \operatorname{Tr} B + \sigma^2 \lVert c\rVert^2
        + \tfrac{\sigma^4}{4} \left(2 \operatorname{Tr} B^2 + (\operatorname{Tr} B)^2\right)

    Args:
        model: a, c and B.
        sigma: σ, a number or a tensor that broadcasts with a.

    Returns:
        (…) float64.

    Raises:
        ValueError: if σ is not positive.

    Source: P1, eqs. 14 and 15.

    Example:
        >>> model = QuadraticIncrement(torch.tensor(1.0), torch.tensor([2.0]), torch.tensor([[4.0]]))
        >>> gaussian_moment(model, 1.0)  # 1 + 4 + 4 + (2 · 16 + 16) / 4
        tensor(21., dtype=torch.float64)
    """
    trace = torch.diagonal(model.b, dim1=-2, dim2=-1).sum(-1)
    return _moment(model.a, model.c.square().sum(-1), trace, trace**2, model.b.square().sum((-2, -1)), sigma)


def _moment(
    a: Tensor, c_square: Tensor, trace: Tensor, square_of_trace: Tensor, trace_of_square: Tensor, sigma: Scalar
) -> Tensor:
    check_sigma(sigma)
    variance = torch.as_tensor(sigma, dtype=torch.float64, device=a.device) ** 2
    quartic = 0.25 * variance**2 * (2.0 * trace_of_square + square_of_trace)
    return a**2 + a * variance * trace + variance * c_square + quartic


def sampled_gaussian_moment(
    a: Tensor, c_square: Tensor, forms: Tensor, squares: Tensor, sigma: Scalar
) -> tuple[Tensor, Tensor]:
    r"""Return :func:`gaussian_moment` where B is known by its products with random vectors alone, as in the full space.

    .. math:: \operatorname{Tr} B = E[v^\top B v], \qquad \operatorname{Tr} B^2 = E\lVert Bv\rVert^2, \qquad
        (\operatorname{Tr} B)^2 = E[(v^\top B v)(u^\top B u)],

    u and v independent vectors of independent signs; the last is the mean over all pairs of different vectors, so that
    the estimate is unbiased.

    Args:
        a: (…) increments.
        c_square: (…) ‖c‖².
        forms: (m, …) vᵀBv of m vectors, the same vectors for all increments.
        squares: (m, …) ‖Bv‖².
        sigma: σ.

    Returns:
        The mean over all increments, a float64 scalar, and its standard error over the vectors (jackknife).

    Raises:
        ValueError: if σ is not positive, or there are fewer than three vectors.

    Source: P1, eq. 15, with Hutchinson 1990 for the traces; Efron 1982 for the jackknife.

    Example:
        >>> one = torch.ones(())
        >>> value, error = sampled_gaussian_moment(one, 4 * one, 4 * torch.ones(3), 16 * torch.ones(3), 1.0)
        >>> float(value), float(error)
        (21.0, 0.0)
    """
    count = len(forms)
    if count < 3:
        raise ValueError(f"forms must hold three vectors or more, got {count}: pairs of all but one must be left.")
    a, c_square, forms, squares = (t.double() for t in (a, c_square, forms, squares))

    def mean_without(left_out: Tensor | None) -> Tensor:
        own = (forms.sum(0), forms.square().sum(0), squares.sum(0))
        n = count
        if left_out is not None:
            n -= 1
            own = tuple(total - part for total, part in zip(own, left_out.unbind(), strict=True))  # type: ignore[assignment]
        form, form_square, square = own
        pairs = (form**2 - form_square) / (n * (n - 1))
        return _moment(a, c_square, form / n, pairs, square / n, sigma).mean()

    value = mean_without(None)
    rows = torch.stack([forms, forms.square(), squares], dim=1)
    others = torch.stack([mean_without(row) for row in rows])
    variance = (count - 1) / count * (others - others.mean()).square().sum()
    return value, variance.sqrt()


def spectral_moment(increments: Tensor, sigma: Scalar) -> Tensor:
    r"""Return the mean square where value and gradient do not change and both Hessians share their eigenvectors.

    .. math:: \tfrac{\sigma^4}{4} \left(2 \sum_i \delta\lambda_i^2 + \left(\sum_i \delta\lambda_i\right)^2\right)

    Args:
        increments: (…, D) δλ, by how much each eigenvalue changes from L_k to L_{k+1}.
        sigma: σ.

    Returns:
        (…) float64.

    Raises:
        ValueError: if σ is not positive.

    Source: P1, corollary 4, eq. 16.

    Example:
        >>> spectral_moment(torch.tensor([1.0, 1.0]), 1.0)
        tensor(2., dtype=torch.float64)
    """
    increments = increments.double()
    zero = torch.zeros(increments.shape[:-1], dtype=torch.float64, device=increments.device)
    trace = increments.sum(-1)
    return _moment(zero, zero, trace, trace**2, increments.square().sum(-1), sigma)


def rate_bound(loss: float, gradient: float, hessian: float, *, k: int, dimension: int, sigma: float) -> float:
    r"""Return a bound on the mean square of the quadratic model, of the order O(k⁻²).

    .. math:: \frac{12 M_\ell^2 + 3\sigma^2 M_g^2 + 3\sigma^4 (D^2 + 2D) M_H^2}{(k+1)^2}

    It holds at a minimum of L_k (P1's setting), or with ``gradient`` a bound on ‖∇ℓ − ∇L_k‖ instead.

    Args:
        loss: M_ℓ, the largest |ℓ| of a sample.
        gradient: M_g, the largest norm of a sample's gradient.
        hessian: M_H, the largest spectral norm of a sample's Hessian.
        k: number of samples before.
        dimension: D.
        sigma: σ.

    Raises:
        ValueError: if k or D is below 1, or σ is not positive.

    Source: P1, theorem 2.

    Example:
        >>> rate_bound(1.0, 1.0, 1.0, k=1, dimension=1, sigma=1.0)  # (12 + 3 + 9) / 4
        6.0
    """
    check_sigma(sigma)
    if k < 1 or dimension < 1:
        raise ValueError(f"k and dimension must be at least 1, got {k} and {dimension}: count samples and directions.")
    terms = 12.0 * loss**2 + 3.0 * sigma**2 * gradient**2 + 3.0 * sigma**4 * (dimension**2 + 2 * dimension) * hessian**2
    return terms / (k + 1) ** 2


def relative_model_error(true: Tensor, model: Tensor, rounding: float = 0.0) -> float:
    r"""Return how far the quadratic model is from the increment, as root mean square over probes (and samples).

    .. math:: r = \sqrt{\frac{\sum (f - q)^2}{\sum f^2}}, \qquad
        \left|\sqrt{\Delta_2[f]} - \sqrt{\Delta_2[q]}\right| \le r \sqrt{\Delta_2[f]}

    so that r bounds the relative error that the model brings into the root of the criterion.

    Args:
        true: f at the probes.
        model: q at the same ones.
        rounding: f that is no larger counts as zero.

    Returns:
        r; NaN where f is zero throughout, infinite where f or q is not finite.

    Example:
        >>> relative_model_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.5]))
        0.1
    """
    true, model = true.double(), model.double()
    square, off = float(true.square().sum()), float((true - model).square().sum())
    if not math.isfinite(square + off):
        return math.inf
    return math.sqrt(off / square) if bool((true.abs() > rounding).any()) else math.nan


def validated_sigma(sigmas: Sequence[float], errors: Sequence[float], tolerance: float = 0.1) -> float:
    """Return the largest σ up to which the quadratic model holds: it, and every smaller one, is within the tolerance.

    Args:
        sigmas: σ at which the model was compared, in any order.
        errors: :func:`relative_model_error` at each.
        tolerance: largest relative error.

    Returns:
        One of ``sigmas``, or NaN where not even the smallest holds.

    Raises:
        ValueError: if there are not as many errors as σ.

    Example:
        >>> validated_sigma([1e-4, 1e-3, 1e-2], [0.001, 0.02, 3.0])
        0.001
    """
    if len(sigmas) != len(errors):
        raise ValueError(
            f"errors must hold one for each σ, got {len(errors)} for {len(sigmas)}: measure both together."
        )
    valid = math.nan
    for sigma, error in sorted(zip(sigmas, errors, strict=True)):
        if not error <= tolerance:  # also NaN
            break
        valid = sigma
    return valid


class DecaySlope(NamedTuple):
    """A power law fitted to a decay.

    Attributes:
        slope: exponent of k + 1; −2 for squared criteria of independent samples.
        standard_error: of the slope, from the scatter about the line; NaN for two points.
        intercept: log of the factor before the power.
    """

    slope: float
    standard_error: float
    intercept: float


def decay_slope(sample_sizes: Sequence[int], values: Sequence[float]) -> DecaySlope:
    r"""Fit :math:`\log \Delta = s \log(k+1) + \text{const}` by least squares.

    Args:
        sample_sizes: k.
        values: Δ at each; those that are not positive and finite are left out.

    Returns:
        NaN throughout where fewer than two are left.

    Source: P1, figure 2; theorem 2 for the exponent −2.

    Example:
        >>> round(decay_slope([1, 3, 7], [1.0, 0.25, 0.0625]).slope, 9)
        -2.0
    """
    points = [
        (math.log(k + 1), math.log(value))
        for k, value in zip(sample_sizes, values, strict=True)
        if value > 0.0 and math.isfinite(value)
    ]
    return DecaySlope(*fit_line(*torch.tensor(points, dtype=torch.float64).reshape(-1, 2).unbind(-1)))


def check_sigma(sigma: Scalar) -> None:
    """Raise unless σ is positive and finite."""
    values = torch.as_tensor(sigma, dtype=torch.float64)
    if not bool(((values > 0.0) & values.isfinite()).all()):
        raise ValueError(f"sigma must be positive, got {sigma}: 1e-3 is a usual width of the probe in parameter units.")
