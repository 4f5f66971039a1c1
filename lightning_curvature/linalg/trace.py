"""Trace of a symmetric operator: sampled, and exact on a subspace where that takes fewer products."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_curvature.arguments import MANY, Rule, checked, fraction, sentence, whole
from lightning_curvature.arguments.rules import check_count
from lightning_curvature.linalg.eigenpairs import Eigenpairs
from lightning_curvature.linalg.krylov import KrylovSpace, MatVec
from lightning_curvature.linalg.samples import TraceSamples
from lightning_curvature.linalg.space import VectorSpace

# Two samples of a remainder with one large eigenvalue both miss it in 6 cases of 100, three in 2.
_MIN_SAMPLES = 3
# A basis begins where it promises to save two products for each of its own, as three samples tell k to a factor of two;
# it goes on while k eigenvalues that are not equal still save one each.
_BEGIN, _GO_ON = 2.0, 0.5
# Products that a Krylov basis takes before it begins to follow the largest eigenvalue.
_BEGINNING = 3
# A remainder whose samples are all below this share of the allowed error is zero or rounding.
_NEGLIGIBLE = 0.1


@dataclass(frozen=True)
class TraceEstimate:
    """A trace with its error.

    Attributes:
        standard_error: its standard deviation, raised where few samples tell it; two of them hold in nine of ten cases.
        samples: number of random vectors in it.
        converged: whether the standard error is at most ``relative_error`` of the value.
        deflated: dimension of the subspace on which it is exact.
        blocks: traces of diagonal blocks, (blocks,) float64 on the CPU, where these are asked for. They add up to the
            value.
        block_errors: their standard errors, (blocks,): up to √2 times too large where blocks are coupled, and more
            beside eigenvectors that have not converged.
    """

    value: float
    standard_error: float
    samples: int
    matvecs: int
    converged: bool
    deflated: int
    blocks: Tensor | None = None
    block_errors: Tensor | None = None


@checked(
    relative_error=fraction("0.05 gives the trace to 5 %"),
    max_matvecs=whole(1, "allow 100", MANY),
    min_samples=whole(1, f"leave it at {_MIN_SAMPLES}", MANY),
    sketch=whole(0, "0 makes no sketch", MANY),
    blocks=Rule("number the block of each tensor, from 0", least=0),
)
def trace(
    matvec: MatVec,
    space: VectorSpace,
    *,
    relative_error: float = 0.05,
    max_matvecs: int = 100,
    min_samples: int = _MIN_SAMPLES,
    deflation: Eigenpairs | None = None,
    sketch: int = 20,
    blocks: Sequence[int] | None = None,
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

    Q consists of the given eigenvectors, at no cost, and samples come first. Their products also tell how many large
    eigenvalues k make up the spread: the squared cosine between two of them is 1/k in the mean. Where more samples than
    2k would follow, Q grows by a Krylov basis from another random vector, in which d products give d columns (Hutch++
    takes 2d), until no more than k/2 would. The last min_samples samples follow it without a product, w as w − qqᵀw
    and Aw as Aw − Aq qᵀw: they are independent of Q, as new ones would be. Where few dimensions are left, and samples
    would take more products than these, the basis goes on to the last, and the trace is exact: from max_matvecs = N + 3
    on. Unlike XTrace, whose samples share their Q, the estimate can be continued until its error is small enough.
    docs/calibration_trace.md and docs/benchmark_spectrum.md compare them.

    The trace of the block of the coordinates b, with P_b the projection onto them, is had from the same products,
    unbiased as well:

    .. math:: \operatorname{tr} P_b A = \operatorname{tr}(P_b\, QQ^\top A QQ^\top)
        + m \operatorname{E}[w^\top P_b (2A - B) w]

    Args:
        matvec: v ↦ Av, in a new tensor; called on every rank.
        space: the space of v.
        relative_error: standard error, relative to the value, at which the sampling ends.
        max_matvecs: products after which it ends in any case.
        min_samples: least number of samples, unless nothing is left to sample.
        deflation: Ritz pairs of the same operator, converged or not, as :func:`eigenpairs` returns them.
        sketch: largest number of products for Q, which keeps a vector of each.
        blocks: for each tensor of the space the number of its block, where the traces of blocks are wanted.
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
    check_count("max_matvecs", max_matvecs, min_samples, "allow 100")
    generator = generator or torch.Generator(space.device).manual_seed(0)
    krylov = KrylovSpace(matvec, space)
    if deflation is not None:
        krylov.deflate(deflation.quotients, deflation.vectors)
    given, samples = krylov.done, TraceSamples(krylov, min_samples, _labels(space, blocks))
    if space.dimension - given <= min(sketch, max_matvecs):
        _complete(krylov, generator)
    sketching, may_sketch = False, True
    while krylov.done < space.dimension and krylov.matvecs < max_matvecs:
        if sketching:
            krylov.step()
            samples.follow()
        else:
            samples.draw(generator)
        value, error = samples.estimate()
        allowed = relative_error * abs(value)
        # A sample is at most m‖Bw‖.
        if samples.left * math.sqrt(samples.squares) <= _NEGLIGIBLE * allowed:
            break
        if samples.count < min_samples:
            continue
        if error <= allowed:
            break
        further = samples.count * ((error / allowed) ** 2 - 1.0) if allowed else math.inf
        length, allowance = krylov.done - given, max_matvecs - krylov.matvecs
        least = max(_BEGINNING - length, 0) + samples.dominant * (_GO_ON if sketching else _BEGIN)
        pays = may_sketch and length < sketch and min(further, allowance) > least
        if sketching and not (pays and krylov.done < len(krylov.basis)):
            krylov.drop_waiting()
            sketching = may_sketch = False
        elif pays and not sketching:
            sketching = krylov.add(space.random(generator))
        if not sketching and samples.left < further and samples.left <= allowance:
            _complete(krylov, generator)
    value, error = samples.estimate()
    traces, errors = (None, None) if blocks is None else samples.by_block()
    return TraceEstimate(
        blocks=traces,
        block_errors=errors,
        value=value,
        standard_error=error,
        samples=samples.count,
        matvecs=krylov.matvecs,
        converged=error <= relative_error * abs(value),
        deflated=krylov.done,
    )


def _labels(space: VectorSpace, blocks: Sequence[int] | None) -> Tensor | None:
    if blocks is None:
        return None
    if len(blocks) != len(space.sizes):
        raise sentence("blocks", "hold one for each tensor", f"{len(blocks)} for {len(space.sizes)}", "leave none out")
    return torch.tensor(blocks, device=space.device)


def _complete(krylov: KrylovSpace, generator: torch.Generator) -> None:
    """Let the basis grow to the whole space."""
    while krylov.done < krylov.space.dimension:
        if krylov.done == len(krylov.basis):
            krylov.add(krylov.space.random(generator))
        krylov.step()
