r"""The change of the loss around a point by one more sample: the increment, its quadratic model and its mean square.

Legend: L_k the mean loss of the first k samples, ℓ the loss of the next one, w the point, U (N, D) an orthonormal basis
of D directions, z ~ N(0, σ²I_D) the perturbation: losses are evaluated at w + Uz. In the full space U is the identity
and D = N. The *increment* is

.. math:: f(z) = L_{k+1} - L_k = \frac{\ell - L_k}{k + 1} \approx a + c^\top z + \tfrac12 z^\top B z

and the criterion of order p is Δ_p(k+1) = E|f(z)|^p. Coefficients and values are float64. Sources are cited by name:
see docs/references.md.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_curvature.arguments import (
    check_broadcast,
    check_fields,
    checked,
    not_negative,
    positive,
    sentence,
    shaped,
    whole,
)

Scalar = Tensor | float

_K = whole(1, "the mean before must hold a sample")
_SIGMA = positive("1e-3 is a usual width of the perturbation in parameter units")
_EACH = "give one of each a sample"
_BOUND = not_negative("give a bound over the samples")


@checked(k=_K)
def increment(sample: Tensor, mean: Tensor, k: int) -> Tensor:
    r"""Return what one more sample adds to a mean over k samples: of losses, gradients or Hessians.

    .. math:: \frac{x_{k+1} - \bar x_k}{k + 1} = \bar x_{k+1} - \bar x_k

    The left side keeps its digits where the difference of two large means loses them.

    Args:
        sample: x_{k+1}.
        mean: x̄_k, of a shape that broadcasts with it.
        k: number of samples in the mean.

    Raises:
        ValueError: if k is below 1.

    Source: Curvature-aligned probing (2026), eq. 5.

    Example:
        >>> increment(torch.tensor(5.0), torch.tensor(2.0), k=2)
        tensor(1.)
    """
    check_broadcast("mean", mean, "sample", sample)
    return (sample - mean) / (k + 1)


@dataclass(frozen=True)
class QuadraticIncrement:
    r"""The quadratic model of the increment in D directions, for one sample or for several along leading dimensions.

    .. math:: q(z) = a + c^\top z + \tfrac12 z^\top B z

    Attributes:
        a: (…) the increment at w.
        c: (…, D) its gradient, U^T (∇L_{k+1} − ∇L_k). The source drops ∇L_k, since its w is a minimum of L_k.
        b: (…, D, D) its Hessian, U^T (∇²L_{k+1} − ∇²L_k) U, symmetric.

    Raises:
        ValueError: if the shapes do not agree.

    Source: Curvature-aligned probing (2026), eqs. 7–9.

    Example:
        >>> model = QuadraticIncrement(torch.tensor(1.0), torch.tensor([1.0, 0.0]), 2.0 * torch.eye(2))
        >>> model.at(torch.tensor([[2.0, 1.0]]))  # 1 + 2 + (4 + 1)
        tensor([8.], dtype=torch.float64)
    """

    a: Tensor
    c: Tensor
    b: Tensor

    def __post_init__(self) -> None:
        check_fields(self, a=shaped("..."), c=shaped("... D", _EACH), b=shaped("... D D", _EACH))
        for name in ("a", "c", "b"):
            object.__setattr__(self, name, getattr(self, name).double())

    @property
    def dimension(self) -> int:
        """D."""
        return self.c.shape[-1]

    @checked(dimension=whole(1, "take one direction or more"))
    def first(self, dimension: int) -> "QuadraticIncrement":
        """Return the model in the first ``dimension`` directions."""
        if dimension > self.dimension:
            raise sentence("dimension", f"be at most D = {self.dimension}", dimension, "take fewer directions")
        return QuadraticIncrement(self.a, self.c[..., :dimension], self.b[..., :dimension, :dimension])

    def without_value(self) -> "QuadraticIncrement":
        """Return the model of the deformation q − a."""
        return QuadraticIncrement(torch.zeros_like(self.a), self.c, self.b)

    @checked()
    def at(self, z: Tensor) -> Tensor:
        """Return q at S perturbations z, (S, D), as (S, …) float64."""
        if z.ndim != 2 or z.shape[1] != self.dimension:
            raise sentence("z", f"be (S, {self.dimension})", tuple(z.shape), "give one row a perturbation")
        z = z.double()
        linear = torch.einsum("sd,...d->s...", z, self.c)
        quadratic = torch.einsum("sd,...de,se->s...", z, self.b, z)
        return self.a + linear + 0.5 * quadratic


@checked(sigma=_SIGMA)
def gaussian_moment(model: QuadraticIncrement, sigma: Scalar) -> Tensor:
    r"""Return the mean square of the quadratic model under Gaussian perturbations, in closed form.

    .. math:: E[q(z)^2] = a^2 + a \sigma^2 \operatorname{Tr} B + \sigma^2 \lVert c\rVert^2
        + \tfrac{\sigma^4}{4} \left(2 \operatorname{Tr} B^2 + (\operatorname{Tr} B)^2\right)

    σ is a number or a tensor that broadcasts with a; the value is (…) float64.

    Raises:
        ValueError: if σ is not positive.

    Source: Curvature-aligned probing (2026), eqs. 14 and 15.

    Example:
        >>> model = QuadraticIncrement(torch.tensor(1.0), torch.tensor([2.0]), torch.tensor([[4.0]]))
        >>> gaussian_moment(model, 1.0)  # 1 + 4 + 4 + (2 · 16 + 16) / 4
        tensor(21., dtype=torch.float64)
    """
    check_sigma(sigma)
    trace = torch.diagonal(model.b, dim1=-2, dim2=-1).sum(-1)
    return _moment(model.a, model.c.square().sum(-1), trace, trace**2, model.b.square().sum((-2, -1)), sigma)


def _moment(
    a: Tensor, c_square: Tensor, trace: Tensor, square_of_trace: Tensor, trace_of_square: Tensor, sigma: Scalar
) -> Tensor:
    variance = torch.as_tensor(sigma, dtype=torch.float64, device=a.device) ** 2
    quartic = 0.25 * variance**2 * (2.0 * trace_of_square + square_of_trace)
    return a**2 + a * variance * trace + variance * c_square + quartic


@checked(a=shaped("..."), c_square=shaped("..."), forms=shaped("m ..."), squares=shaped("m ..."), sigma=_SIGMA)
def sampled_gaussian_moment(
    a: Tensor, c_square: Tensor, forms: Tensor, squares: Tensor, sigma: Scalar
) -> tuple[Tensor, Tensor]:
    r"""Return :func:`gaussian_moment` from products of B with random vectors alone, as in the full space.

    .. math:: \operatorname{Tr} B = E[v^\top B v], \qquad \operatorname{Tr} B^2 = E\lVert Bv\rVert^2, \qquad
        (\operatorname{Tr} B)^2 = E[(v^\top B v)(u^\top B u)],

    u and v independent vectors of random signs. The last mean is over all pairs of different vectors, which makes the
    estimate unbiased.

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

    Source: Curvature-aligned probing (2026), eq. 15, with Hutchinson 1990 for the traces; Efron 1982 for the jackknife.

    Example:
        >>> one = torch.ones(())
        >>> value, error = sampled_gaussian_moment(one, 4 * one, 4 * torch.ones(3), 16 * torch.ones(3), 1.0)
        >>> float(value), float(error)
        (21.0, 0.0)
    """
    check_sigma(sigma)
    count = len(forms)
    if count < 3:
        raise ValueError(f"forms must hold three vectors or more, got {count}: pairs of all but one must be left.")
    a, c_square, forms, squares = (t.double() for t in (a, c_square, forms, squares))

    def moment(sums: Tensor, n: int) -> Tensor:
        form, form_square, square = sums
        pairs = (form**2 - form_square) / (n * (n - 1))
        return _moment(a, c_square, form / n, pairs, square / n, sigma).mean()

    sums = torch.stack([forms.sum(0), forms.square().sum(0), squares.sum(0)])
    rows = torch.stack([forms, forms.square(), squares], dim=1)
    left_out = torch.stack([moment(sums - row, count - 1) for row in rows])
    variance = (count - 1) / count * (left_out - left_out.mean()).square().sum()
    return moment(sums, count), variance.sqrt()


@checked(loss=_BOUND, gradient=_BOUND, hessian=_BOUND, k=_K, dimension=whole(1, "count the directions"), sigma=_SIGMA)
def rate_bound(loss: float, gradient: float, hessian: float, *, k: int, dimension: int, sigma: float) -> float:
    r"""Return a bound on the mean square of the quadratic model, of the order O(k⁻²).

    .. math:: \frac{12 M_\ell^2 + 3\sigma^2 M_g^2 + 3\sigma^4 (D^2 + 2D) M_H^2}{(k+1)^2}

    The bound holds at a minimum of L_k, the setting of the source; elsewhere take a bound on ‖∇ℓ − ∇L_k‖ for M_g.

    Args:
        loss: M_ℓ, the largest ``|ℓ|`` of a sample.
        gradient: M_g, the largest norm of a sample's gradient.
        hessian: M_H, the largest spectral norm of a sample's Hessian.
        k: number of samples in the mean.
        dimension: D.
        sigma: σ.

    Raises:
        ValueError: if k or D is below 1, or σ is not positive.

    Source: Curvature-aligned probing (2026), theorem 2.

    Example:
        >>> rate_bound(1.0, 1.0, 1.0, k=1, dimension=1, sigma=1.0)  # (12 + 3 + 9) / 4
        6.0
    """
    terms = 12.0 * loss**2 + 3.0 * sigma**2 * gradient**2 + 3.0 * sigma**4 * (dimension**2 + 2 * dimension) * hessian**2
    return terms / (k + 1) ** 2


def check_sigma(sigma: Scalar) -> None:
    """Raise ValueError unless the values of a σ that is a tensor are positive and finite."""
    if isinstance(sigma, Tensor) and not bool(((sigma > 0.0) & sigma.isfinite()).all()):
        raise sentence("sigma", "be positive and finite", sigma.tolist(), _SIGMA.remedy)
