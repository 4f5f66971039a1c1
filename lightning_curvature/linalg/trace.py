"""Trace of a symmetric operator: exact on a subspace, sampled on the rest."""

import math
from dataclasses import dataclass

import torch

from lightning_curvature.arguments import MANY, checked, fraction, whole
from lightning_curvature.linalg.eigenpairs import Eigenpairs
from lightning_curvature.linalg.krylov import KrylovSpace, MatVec, check_finite
from lightning_curvature.linalg.space import VectorSpace

# n samples of a remainder with k equal eigenvalues follow χ² with nk degrees of freedom: three standard errors hold in
# 99 of 100 cases from nk = 16 on. 6 samples suffice for three eigenvalues, as after the sketch. (For one, in 97 cases.)
_MIN_SAMPLES = 6
# A remainder whose samples are all below this share of the allowed error is zero or rounding.
_NEGLIGIBLE = 0.1


@dataclass(frozen=True)
class TraceEstimate:
    """A trace with its error.

    Attributes:
        standard_error: its standard deviation; three of them hold in 99 of 100 cases.
        samples: number of random vectors in it.
        converged: whether the standard error is at most ``relative_error`` of the value.
        deflated: dimension of the subspace on which it is exact.
    """

    value: float
    standard_error: float
    samples: int
    matvecs: int
    converged: bool
    deflated: int


@checked(
    relative_error=fraction("0.05 gives the trace to 5 %"),
    max_matvecs=whole(1, "allow 100", MANY),
    min_samples=whole(1, f"leave it at {_MIN_SAMPLES}", MANY),
    sketch=whole(0, "0 makes no sketch", MANY),
)
def trace(
    matvec: MatVec,
    space: VectorSpace,
    *,
    relative_error: float = 0.05,
    max_matvecs: int = 100,
    min_samples: int = _MIN_SAMPLES,
    deflation: Eigenpairs | None = None,
    sketch: int = 10,
    generator: torch.Generator | None = None,
) -> TraceEstimate:
    r"""Estimate the trace of a symmetric operator.

    .. math:: \operatorname{tr} A = \operatorname{tr}(Q^\top A Q)
        + m \operatorname{E}[w^\top A w], \qquad B = (I - QQ^\top) A (I - QQ^\top)

    Q has orthonormal columns, w is a random unit vector orthogonal to them, m = N − d the dimension of its space. The
    estimate is unbiased for any Q that is independent of w. Its variance is that of B alone, and follows from the
    lengths of the same products:

    .. math:: \operatorname{Var}[m\, w^\top B w] = \tfrac{2 m^2}{m + 2}
        \left(\operatorname{E}\lVert Bw \rVert^2 - \operatorname{E}[w^\top B w]^2\right)

    The standard error is thus reliable from the first few samples on; from the scatter of the samples it would take 15.

    Q consists of the given eigenvectors, at no cost, and of a Krylov basis from a random vector, in which d products
    give d columns (Hutch++ takes 2d). The first of them also gives the variance: where samples alone would take fewer
    products, the basis ends there. Where few dimensions are left, and samples would take more products than these, the
    basis goes on to the last, and the trace is exact: from max_matvecs = N + 2 on. Unlike XTrace, whose samples share
    their Q, the estimate can be continued until its error is small enough. docs/benchmark_spectrum.md compares them.

    Args:
        matvec: v ↦ Av, in a new tensor; called on every rank.
        space: the space of v.
        relative_error: standard error, relative to the value, at which the sampling ends.
        max_matvecs: products after which it ends in any case.
        min_samples: least number of samples, unless nothing is left to sample.
        deflation: Ritz pairs of the same operator, converged or not, as :func:`eigenpairs` returns them.
        sketch: largest number of products for Q. Ten suit an error of 5 %, twenty one of 1 %.
        generator: of the random vectors, on the device of the space; default: seed 0.

    Returns:
        The estimate, also where it did not converge: a trace near zero has no small relative error.

    Raises:
        ValueError: if an argument is out of range.
        NonFiniteProductError: if a product is not finite.

    Source: Meyer et al. 2021 (Hutch++); Chen and Hallman 2022 (Krylov basis); Epperly, Tropp and Webber 2024 (XTrace;
    unit vectors).

    Example:
        >>> diagonal = torch.tensor([-10.0, 5.0, 3.0, 2.0], dtype=torch.float64)
        >>> estimate = trace(lambda v: diagonal * v, VectorSpace([diagonal]))
        >>> abs(round(estimate.value, 9)), estimate.standard_error, estimate.deflated
        (0.0, 0.0, 4)
    """
    _check(max_matvecs, min_samples, sketch)
    generator = generator or torch.Generator(space.device).manual_seed(0)
    krylov = KrylovSpace(matvec, space)
    if deflation is not None:
        krylov.deflate(deflation.quotients, deflation.vectors)
    if sketch:
        krylov.add(space.random(generator))
    while krylov.matvecs < sketch and krylov.done < len(krylov.basis):
        krylov.step()
        if krylov.matvecs == 1 and _samples_suffice(krylov, relative_error, sketch, min_samples):
            break
    krylov.drop_waiting()
    known, left = float(krylov.projected.trace()), space.dimension - krylov.done

    value, error, samples = known, 0.0, 0
    forms = squares = 0.0  # sums of wᵀBw and ‖Bw‖²
    while left and krylov.matvecs + samples < max_matvecs:
        form, square = _sample(krylov, generator, krylov.matvecs + samples + 1)
        samples += 1
        forms, squares = forms + form, squares + square
        value = known + left * forms / samples
        # ‖Bw‖² ≥ (wᵀBw)²: only rounding makes the difference of the means negative.
        spread = max(squares / samples - (forms / samples) ** 2, 0.0)
        error = left * math.sqrt(2.0 / (left + 2) * spread / samples)
        allowed = relative_error * abs(value)
        needed = samples * (error / allowed) ** 2 if allowed else math.inf
        if samples > 1 and needed - samples > left and krylov.matvecs + samples + left <= max_matvecs:
            # The rest of the basis takes fewer products than the samples would.
            while krylov.done < space.dimension:
                if krylov.done == len(krylov.basis):
                    krylov.add(space.random(generator))
                krylov.step()
            value, error = float(krylov.projected.trace()), 0.0
            break
        # A sample is at most m‖Bw‖.
        if left * math.sqrt(squares) <= _NEGLIGIBLE * allowed or (samples >= min_samples and error <= allowed):
            break
    return TraceEstimate(
        value=value,
        standard_error=error,
        samples=samples,
        matvecs=krylov.matvecs + samples,
        converged=error <= relative_error * abs(value),
        deflated=krylov.done,
    )


def _samples_suffice(krylov: KrylovSpace, relative_error: float, sketch: int, min_samples: int) -> bool:
    """Return whether samples alone reach the error before the sketch: its first product gives wᵀBw and ‖Bw‖²."""
    row = krylov.done - 1
    left = krylov.space.dimension - row
    if left <= sketch + min_samples:
        return False
    column = krylov.projected[:, row].tolist()
    spread = sum(entry**2 for entry in column[krylov.done :])
    allowed = relative_error * abs(float(krylov.projected[:row, :row].trace()) + left * column[row])
    if not allowed:
        return False
    needed = 2.0 * left**2 / (left + 2) * spread / allowed**2
    return 1 + max(needed, min_samples) <= sketch + min_samples


def _sample(krylov: KrylovSpace, generator: torch.Generator, number: int) -> tuple[float, float]:
    """Return wᵀBw and ‖Bw‖² of a random unit vector w orthogonal to the basis."""
    space, basis = krylov.space, krylov.basis
    w = space.random(generator)
    basis.orthogonalize(w)
    w /= space.norm(w)
    product = krylov.matvec(w).clone()
    basis.orthogonalize(product)
    form, square = torch.cat([space.dots([product.unsqueeze(0)], other) for other in (w, product)]).tolist()
    check_finite((form, square), number)
    return form, square


def _check(max_matvecs: int, min_samples: int, sketch: int) -> None:
    if max_matvecs < sketch + min_samples:
        raise ValueError(
            f"max_matvecs must be at least sketch + min_samples, got {max_matvecs} for {sketch} + {min_samples}: allow "
            "100, or make a smaller sketch."
        )
