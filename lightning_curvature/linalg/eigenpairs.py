"""Extreme eigenpairs of a symmetric operator: band Lanczos with full reorthogonalization and thick restarts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_curvature.arguments import MANY, Rule, checked, fraction, whole
from lightning_curvature.linalg.bounds import OverlookedBounds
from lightning_curvature.linalg.krylov import KrylovSpace, MatVec
from lightning_curvature.linalg.prediction import predicted
from lightning_curvature.linalg.space import VectorSpace

# Restarts keep this share of the basis: dropped directions have to be found again, kept ones take the room of new ones.
_KEPT_SHARE = 0.5

# Length of the random vector that is added to each start vector, of length 1: another eigenvalue, whose vector is
# orthogonal to the start vector, may be the largest by now. A longer one detects it more reliably, a shorter one takes
# fewer products until the residual is small.
_ADMIXTURE = 0.3

# A search continues until, with 95 % probability, no eigenvalue lies beyond the chosen ones by more than this share of
# their size. It takes 0.1 products more than 0.15, and one fewer than 0.05.
_OVERLOOKED = 0.1
# In so few dimensions a product costs as much as the search around it. With the second eigenvalue 4 % below the first,
# in 26 to 128 dimensions, a share of 0.15 settled on the second in 6 of 240 searches from random vectors, and in 19 of
# 120 that began with an eigenvector; 0.005 in none of either, for one product more, or four.
_FEW_DIMENSIONS, _OVERLOOKED_IN_FEW = 128, 0.005

_COUNT = whole(0, "1 is the outermost alone", MANY)
_START = Rule("give vectors of the space", empty=True)


@dataclass(frozen=True)
class Eigenpairs:
    r"""Eigenpairs, and how far off they are.

    Attributes:
        values: (k,) float64 on the CPU, in the order of the arguments of :func:`eigenpairs`.
        errors: (k,) float64, how far the values may be off (:func:`~.prediction.predicted`), and their noise.
        vectors: k unit vectors of the space, the Ritz vectors v_i.
        quotients: (k,) float64, :math:`\theta_i = v_i^\top A v_i`. Values are what these rise to.
        residuals: (k,) float64, :math:`\lVert Av_i - \theta_i v_i\rVert`.
        converged: whether the search for each ended: its error is below the tolerance, and it is unlikely that a
            further eigenvalue was overlooked. A pair with a small error and without ``converged`` is an eigenpair,
            possibly the wrong one.
        gaps: upper bounds on the distance from the last of the largest, and of the smallest, to the next eigenvalue,
            relative to its size; infinite where none of that end was asked for.
        upper, lower: no eigenvalue is larger, or smaller, with 95 % probability each: see :func:`eigenpairs`.
        iterations: restarts of the basis, plus one.
        asymmetry: largest ``|u·Av − v·Au|`` among basis vectors: the noise of the products.
    """

    values: Tensor
    errors: Tensor
    vectors: list[Tensor] = field(repr=False)
    quotients: Tensor
    residuals: Tensor
    converged: tuple[bool, ...]
    gaps: tuple[float, float]
    upper: float
    lower: float
    matvecs: int
    iterations: int
    asymmetry: float


@checked(
    largest=_COUNT,
    smallest=_COUNT,
    magnitude=_COUNT,
    tolerance=fraction("1e-3 gives an eigenvalue to 3 digits"),
    residual_tolerance=fraction("1e-3 turns a vector by at most that over the relative gap"),
    max_matvecs=whole(1, "allow 20 for each", MANY),
    max_basis=whole(1, "64 suit most searches", MANY),
    start=_START,
    block_size=whole(1, "None takes the number of pairs at either end", MANY),
)
def eigenpairs(
    matvec: MatVec,
    space: VectorSpace,
    *,
    largest: int = 0,
    smallest: int = 0,
    magnitude: int = 0,
    tolerance: float = 1e-3,
    residual_tolerance: float | None = None,
    max_matvecs: int = 200,
    max_basis: int = 64,
    start: Sequence[Tensor] = (),
    before: "Eigenpairs | None" = None,
    block_size: int | None = None,
    generator: torch.Generator | None = None,
) -> Eigenpairs:
    r"""Compute extreme eigenpairs of a symmetric operator.

    .. math:: A v_i = \lambda_i v_i, \qquad \lvert \text{value}_i - \lambda_i \rvert \le \text{tolerance} \cdot
        \lvert \lambda_i \rvert

    "Largest" and "smallest" are algebraic: of the eigenvalues −10, 5, 3 the largest is 5 and the largest by magnitude
    is −10. Values come in this order: the largest, descending; the smallest, ascending; by magnitude, descending.

    The method is band Lanczos with full reorthogonalization: the basis begins with a block of start vectors, each
    product adds one vector to it, and a full basis is restarted from its best Ritz vectors (thick restart). A block of
    p start vectors finds eigenvalues of multiplicity up to p, a single one only one copy of each. Residuals and gaps
    bound how far an eigenvalue is from its Ritz value, and predict where (:func:`~.prediction.predicted`): the search
    ends on that. Eigenvalues closer than the residual count as one.

    A small error shows that there is an eigenvalue, not that it is the largest: a start vector orthogonal to the
    eigenvector of the largest never finds it. But the first start vector is at least partly random, which bounds what
    it can have overlooked (:class:`~.bounds.OverlookedBounds`): ``upper`` and ``lower`` hold with 95 % probability
    each, over the random vectors, for any operator and any ``start``. The search continues until ``upper`` exceeds the
    largest by at most 10 % of its size, 0.5 % in up to 128 dimensions, and likewise for the smallest. For further pairs
    the same rule takes the pairs before them as exact. A search that goes on from the pairs ``before`` has no random
    part: it may end after one product, and nothing is known of what it overlooks, so that ``upper`` is infinite.

    Args:
        matvec: v ↦ Av for a vector of the space; must return a new tensor. Called on every rank.
        space: the vector space.
        largest: number of algebraically largest pairs.
        smallest: number of algebraically smallest pairs.
        magnitude: number of largest pairs by magnitude.
        tolerance: relative error at which an eigenvalue has converged; not below the limit that rounding sets.
        residual_tolerance: relative residual at which its vector has; None: eigenvalues alone decide.
        max_matvecs: products after which the search ends; pairs that did not converge by then are returned as they are.
        max_basis: vectors kept in memory; rounded up to the minimum for the number of pairs.
        start: vectors near the eigenvectors, any number and length; a random part is added to each. None: random ones.
        before: pairs of the same number and kind of an operator close to this one. The search goes on from their
            vectors as they are, and takes gaps for no wider than they were.
        block_size: number of random start vectors where ``start`` is empty; default: number of pairs at either end.
        generator: of the random vectors, on the device of the space; default: seed 0.

    Raises:
        ValueError: if no pair is requested, as many as there are coordinates or more, or an argument is out of range.
        NonFiniteProductError: if a product is not finite.

    Source: Ruhe 1979 (band Lanczos); Wu and Simon 2000 (thick restart); Mathias 1998 (errors); van Dorsselaer,
    Hochstenbach and van der Vorst 2000 (what may have been overlooked).

    Example:
        >>> diagonal = torch.tensor([-10.0, 5.0, 3.0, 2.0], dtype=torch.float64)
        >>> space = VectorSpace([diagonal])
        >>> eigenpairs(lambda v: diagonal * v, space, largest=1, smallest=1).values.round(decimals=9)
        tensor([  5., -10.], dtype=torch.float64)
    """
    # Not torch.lobpcg: it takes a matrix, needs 3k ≤ N and multiplies three blocks a step. Not ARPACK: it copies each
    # vector to the host, keeps its basis there and supports no sharded vectors.
    wanted = _Wanted(largest, smallest, magnitude)
    wanted.check(space, tolerance, max_matvecs)
    block = block_size if block_size is not None else max(wanted)
    generator = generator or torch.Generator(space.device).manual_seed(0)
    krylov = KrylovSpace(matvec, space)
    for vector in start:
        krylov.add(_mixed(space, vector, generator))
    for vector in before.vectors if before is not None else ():
        space.check(vector)
        krylov.add(vector)
    while len(krylov.basis) < (len(start) or block) and krylov.add(space.random(generator)):
        pass
    block = len(krylov.basis)
    bounds = OverlookedBounds(space.dimension, _ADMIXTURE / (1.0 + _ADMIXTURE) if len(start) else 1.0)
    known = (math.inf, math.inf) if before is None else before.gaps
    # The waiting rows are as many as the block and survive a restart: half of the remaining rows must suffice.
    share = _OVERLOOKED if space.dimension > _FEW_DIMENSIONS else _OVERLOOKED_IN_FEW
    capacity = max(max_basis, 2 * (sum(wanted) + magnitude) + block + 2)

    while True:
        krylov.step()
        ritz, vectors, couplings = krylov.ritz()
        bounds.update(ritz, vectors, couplings)
        if krylov.done >= sum(wanted) and krylov.matvecs >= min(block, max_matvecs):
            chosen = wanted.choose(ritz)
            values, errors, gaps = wanted.predicted(krylov, ritz, couplings, chosen, krylov.matvecs > block, known)
            residuals = couplings[:, chosen].norm(dim=0)
            goal = (tolerance * values.abs()).clamp(min=krylov.rounding)
            converged = errors <= goal
            if residual_tolerance is not None:
                converged &= residuals <= (residual_tolerance * values.abs()).clamp(min=krylov.rounding)
            last = krylov.done == space.dimension or krylov.matvecs >= max_matvecs
            if (last or converged.all()) and before is None:
                allowed = (share * values.abs()).clamp(min=krylov.rounding)
                converged &= wanted.overlooked(bounds, values) <= allowed
            if last or converged.all():
                break
        if krylov.done == len(krylov.basis):
            # Every chain has ended in an invariant subspace that holds too few pairs.
            krylov.add(space.random(generator))
        elif len(krylov.basis) >= capacity:
            kept = wanted.choose_kept(ritz, capacity - block)
            krylov.restart(vectors[:, kept], ritz[kept])
            bounds.restart(len(kept))

    return Eigenpairs(
        values=values,
        errors=(errors.square() + krylov.asymmetry**2).sqrt(),
        vectors=[krylov.basis.combine(vectors[:, i]) for i in chosen.tolist()],
        quotients=ritz[chosen],
        residuals=residuals,
        # Noisier products have no eigenvalues to that tolerance.
        converged=tuple((converged & (krylov.asymmetry <= goal)).tolist()),
        gaps=gaps,
        upper=bounds.above(0) if before is None else math.inf,
        lower=bounds.below(0) if before is None else -math.inf,
        matvecs=krylov.matvecs,
        iterations=krylov.restarts + 1,
        asymmetry=krylov.asymmetry,
    )


def _mixed(space: VectorSpace, vector: Tensor, generator: torch.Generator) -> Tensor:
    """Return the unit vector plus a random one of length _ADMIXTURE; the random one alone for a vector of zeros."""
    noise, norm = space.random(generator), space.norm(vector)
    noise.mul_(_ADMIXTURE / space.norm(noise))
    return noise.add_(vector, alpha=1.0 / norm) if norm else noise


class _Wanted(NamedTuple):
    """Number of wanted pairs of each kind."""

    largest: int
    smallest: int
    magnitude: int

    def check(self, space: VectorSpace, tolerance: float, max_matvecs: int) -> None:
        wanted = sum(self)
        if wanted < 1:
            raise ValueError(
                f"largest, smallest and magnitude must count at least one eigenpair, got {self.largest}, "
                f"{self.smallest} and {self.magnitude}: give largest=1 for the largest eigenvalue."
            )
        if wanted >= space.dimension:
            raise ValueError(
                f"the number of eigenpairs must be below the number of parameters, got {wanted} of {space.dimension}: "
                "for all of them build the matrix and call torch.linalg.eigh."
            )
        if max_matvecs < wanted:
            raise ValueError(
                f"max_matvecs must be at least the number of eigenpairs, got {max_matvecs} for {wanted}: allow 20 for "
                "each."
            )

    def choose(self, values: Tensor) -> Tensor:
        """Return the indices of the wanted ones among Ritz values in descending order."""
        by_magnitude = values.abs().argsort(descending=True, stable=True)[: self.magnitude]
        ends = [*range(self.largest), *range(len(values) - 1, len(values) - 1 - self.smallest, -1)]
        return torch.cat([torch.tensor(ends, dtype=torch.long), by_magnitude])

    def predicted(
        self,
        krylov: KrylovSpace,
        ritz: Tensor,
        couplings: Tensor,
        chosen: Tensor,
        began: bool,
        gaps: tuple[float, float],
    ) -> tuple[Tensor, Tensor, tuple[float, float]]:
        """Return the values to which the chosen Ritz values go, outwards, their errors, and the gaps behind them."""
        place = torch.arange(len(chosen))
        top = (place < self.largest) | ((place >= self.largest + self.smallest) & (ritz[chosen] > 0.0))
        values, errors, (above, below) = torch.zeros_like(ritz[chosen]), torch.zeros_like(ritz[chosen]), gaps
        if top.any():
            at = chosen[top]
            found, off, above = predicted(krylov.projected, ritz, couplings, began, len(at.unique()), above)
            values[top], errors[top] = found[at], off[at]
        if not top.all():
            at = len(ritz) - 1 - chosen[~top]
            mirrored = -krylov.projected, -ritz.flip(0), couplings.flip(1)
            found, off, below = predicted(*mirrored, began, len(at.unique()), below)
            values[~top], errors[~top] = -found[at], off[at]
        return values, errors, (above, below)

    def choose_kept(self, values: Tensor, capacity: int) -> Tensor:
        """Return the indices of the Ritz values that a restart keeps: the wanted and the next ones at both ends."""
        room = min(max(sum(self) + self.magnitude, int(_KEPT_SHARE * capacity)), len(values) - 1)
        top, bottom = self.largest + self.magnitude, self.smallest + self.magnitude
        upper = max(top, round(room * top / (top + bottom)))
        lower = min(max(bottom, room - upper), len(values) - upper)
        return torch.tensor([*range(upper), *range(len(values) - lower, len(values))], dtype=torch.long)

    def overlooked(self, bounds: OverlookedBounds, chosen: Tensor) -> Tensor:
        """Return how far beyond each chosen value an overlooked one may lie that belongs in its place, (chosen,)."""
        distances, top, bottom = [], 0, 0
        for place, value in enumerate(chosen.tolist()):
            if place < self.largest:
                distances.append(bounds.above(place) - value)
            elif place < self.largest + self.smallest:
                distances.append(value - bounds.below(place - self.largest))
            else:
                # Of the pairs before this one, ``top`` are from the upper end and ``bottom`` from the lower.
                distances.append(max(bounds.above(top), -bounds.below(bottom)) - abs(value))
                top, bottom = top + (value > 0.0), bottom + (value <= 0.0)
        return torch.tensor(distances, dtype=torch.float64)
