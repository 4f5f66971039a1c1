"""Extreme eigenpairs of a symmetric operator: band Lanczos with full reorthogonalization and thick restarts."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_curvature.linalg.bounds import OverlookedBounds
from lightning_curvature.linalg.krylov import KrylovSpace, MatVec
from lightning_curvature.linalg.space import VectorSpace

# Restarts keep this share of the basis: what is thrown away must be found again, what is kept leaves no room.
_KEPT_SHARE = 0.5

# Length of the random vector that is added to each start vector, of length 1: another eigenvalue may have overtaken the
# one followed since, with a vector that is orthogonal to it. The longer, the surer it shows; the shorter, the fewer
# products until the residual is small.
_ADMIXTURE = 0.3

# A search goes on until no eigenvalue is likelier than 5 % to lie beyond those found by more than this share of their
# size. Of 260 searches that began with the first of 2e4 to 1e6 eigenvalues while another was 10 % larger, 34 overlooked
# that one with a share of 0.25, 8 with 0.15, 6 with 0.1, all by the residual alone. Where nothing had overtaken they
# took 4.0, 6.8 and 7.0 products on three such matrices with 0.15, and 4.0, 5.5 and 6.0 with 0.25. Every 20 steps of the
# first 100 of a GPT of 1.8 million parameters it was 10.5 with 0.15, 9.5 with 0.25, 8.2 by the residual alone and 10.2
# without start vectors, where the bound costs nothing.
_OVERLOOKED = 0.15


@dataclass(frozen=True)
class Eigenpairs:
    r"""Eigenpairs with what is known of their errors.

    ``residuals`` holds :math:`\\lVert Av_i - \\theta_i v_i\\rVert`: some eigenvalue of A lies within that distance of
    θ_i, and for a well separated one the distance is about its square over the gap.

    Attributes:
        values: (k,) float64 on the CPU, in the order asked for.
        vectors: k unit vectors of the space.
        residuals: (k,) float64.
        converged: whether the search for each came to its end: its residual, and the noise of the products, fell below
            the tolerance, and an eigenvalue that should stand in its place is not likely to have been overlooked. With
            a small residual and without ``converged`` it is an eigenvalue, and may be the wrong one.
        upper: no eigenvalue is larger, with 95 % probability: see :func:`eigenpairs`.
        lower: no eigenvalue is smaller, with 95 % probability.
        matvecs: products made.
        iterations: restarts of the basis, plus one.
        asymmetry: largest |u·Av − v·Au| seen among basis vectors: the noise of the products.
    """

    values: Tensor
    vectors: list[Tensor] = field(repr=False)
    residuals: Tensor
    converged: tuple[bool, ...]
    upper: float
    lower: float
    matvecs: int
    iterations: int
    asymmetry: float

    @property
    def errors(self) -> Tensor:
        """Bound on the distance of each value to an eigenvalue: residual and noise of the products, (k,)."""
        return (self.residuals.square() + self.asymmetry**2).sqrt()


def eigenpairs(
    matvec: MatVec,
    space: VectorSpace,
    *,
    largest: int = 0,
    smallest: int = 0,
    magnitude: int = 0,
    tolerance: float = 1e-3,
    max_matvecs: int = 200,
    max_basis: int = 64,
    start: Sequence[Tensor] = (),
    block_size: int | None = None,
    generator: torch.Generator | None = None,
) -> Eigenpairs:
    r"""Find extreme eigenpairs of a symmetric operator.

    .. math:: A v_i = \theta_i v_i, \qquad \lVert A v_i - \theta_i v_i \rVert \le \text{tolerance} \cdot |\theta_i|

    "Largest" and "smallest" are algebraic: of the eigenvalues −10, 5, 3 the largest is 5 and the largest by magnitude
    is −10. Values come in this order: the largest, descending; the smallest, ascending; by magnitude, descending.

    The method is band Lanczos: the basis is begun with a block of vectors, each product adds one vector to it, and
    Rayleigh–Ritz on the whole basis gives values and residuals. With one start vector it is Lanczos; with the
    eigenvectors of a neighbouring operator in ``start`` it begins where that one ended. The basis is kept orthogonal to
    rounding, so that no spurious copies of an eigenvalue arise. A basis that is full is restarted from its best Ritz
    vectors (thick restart), which keeps the relation between basis and operator, and so the residuals.

    A block of p start vectors finds eigenvalues of multiplicity up to p, a single one only one copy of each.

    A small residual tells that there is an eigenvalue, not that it is the largest. A vector that has no part along the
    eigenvector of the largest never finds it; but the first start vector is random, in part at least, and what the
    products say of that part bounds what can have been overlooked. ``upper`` and ``lower`` hold with 95 % probability
    each, for any operator, whatever ``start`` is, up to the noise of the products; the 5 % are over the random vectors
    of this search, so that searches with the same generator on the same operator share their luck. The search goes on
    until ``upper`` is above the largest by no more than 15 % of its size, and the same for the smallest. For further
    pairs the same rule is used with the pairs before them taken for granted, which is no theorem: 8 of 180 searches
    for two or three pairs, one of which had been overtaken by 10 to 40 %, overlooked that one, 140 by the residuals
    alone.

    Why not a library: ``torch.lobpcg`` takes a matrix, not a function, needs 3k ≤ N, and multiplies a block of three
    times as many vectors a step; ``scipy.sparse.linalg.eigsh`` (ARPACK) is good, and copies the vector to the host and
    the product back each time, holds its basis there, and sees no sharded vector.

    Args:
        matvec: v ↦ Av for a vector of the space; must return a new tensor. Called on every rank.
        space: the vector space.
        largest: how many of the algebraically largest.
        smallest: how many of the algebraically smallest.
        magnitude: how many of the largest by magnitude.
        tolerance: relative residual at which a pair counts as found, not below what rounding allows.
        max_matvecs: give up after as many products; what was found is returned with ``converged`` false.
        max_basis: vectors kept in memory; rounded up to what the number of pairs needs.
        start: vectors near the eigenvectors, any number, of any length; a random part is added to each. None: random
            ones.
        block_size: random start vectors where none are given; default: as many as pairs are wanted at either end.
        generator: of the random vectors, on the device of the space; default: seed 0.

    Returns:
        The eigenpairs, also where they have not converged.

    Raises:
        ValueError: if no pair is asked for, as many as there are coordinates or more, or an argument is out of range.
        NonFiniteProductError: if a product is not finite.

    Source: Ruhe 1979 (band Lanczos); Wu and Simon 2000 (thick restart); van Dorsselaer, Hochstenbach and van der Vorst
    2000 (bounds).

    Example:
        >>> diagonal = torch.tensor([-10.0, 5.0, 3.0, 2.0], dtype=torch.float64)
        >>> space = VectorSpace([diagonal])
        >>> eigenpairs(lambda v: diagonal * v, space, largest=1, smallest=1).values.round(decimals=9)
        tensor([  5., -10.], dtype=torch.float64)
    """
    wanted = largest + smallest + magnitude
    _check(space, largest, smallest, magnitude, tolerance, max_matvecs)
    block = block_size if block_size is not None else max(largest, smallest, magnitude)
    generator = generator or torch.Generator(space.device).manual_seed(0)
    krylov = KrylovSpace(matvec, space)
    for vector in start:
        krylov.add(_mixed(space, vector, generator))
    while len(krylov.basis) < (len(start) or block) and krylov.add(space.random(generator)):
        pass
    block = len(krylov.basis)
    bounds = OverlookedBounds(space.dimension, _ADMIXTURE / (1.0 + _ADMIXTURE) if len(start) else 1.0)
    # The waiting rows are as many as the block and stay in a restart: half of what is beside them must do for the rest.
    capacity = max(max_basis, 2 * (wanted + magnitude) + block + 2)

    while True:
        krylov.step()
        values, vectors, couplings = krylov.ritz()
        bounds.update(values, vectors, couplings)
        if krylov.done >= wanted and krylov.matvecs >= min(block, max_matvecs):
            chosen = _choose(values, largest, smallest, magnitude)
            residuals = couplings[:, chosen].norm(dim=0)
            goal = (tolerance * values[chosen].abs()).clamp(min=krylov.rounding)
            converged = residuals <= goal
            last = krylov.done == space.dimension or krylov.matvecs >= max_matvecs
            if last or converged.all():
                overlooked = _overlooked(bounds, values, chosen, largest, smallest)
                allowed = (_OVERLOOKED * values[chosen].abs()).clamp(min=krylov.rounding)
                converged &= overlooked <= allowed
            if last or converged.all():
                break
        if krylov.done == len(krylov.basis):
            # Every chain has ended in an invariant subspace that holds too few pairs.
            krylov.add(space.random(generator))
        elif len(krylov.basis) >= capacity:
            kept = _choose_kept(values, largest, smallest, magnitude, capacity - block)
            krylov.restart(vectors[:, kept], values[kept])
            bounds.restart(len(kept))

    return Eigenpairs(
        values=values[chosen],
        vectors=[krylov.basis.combine(vectors[:, i]) for i in chosen.tolist()],
        residuals=residuals,
        # Products that are noisier than that have no eigenpairs to that tolerance.
        converged=tuple((converged & (krylov.asymmetry <= goal)).tolist()),
        upper=bounds.above(0),
        lower=bounds.below(0),
        matvecs=krylov.matvecs,
        iterations=krylov.restarts + 1,
        asymmetry=krylov.asymmetry,
    )


def _mixed(space: VectorSpace, vector: Tensor, generator: torch.Generator) -> Tensor:
    """A vector of unit length and a random one of length _ADMIXTURE; the random one alone for a vector of zeros."""
    noise, norm = space.random(generator), space.norm(vector)
    noise.mul_(_ADMIXTURE / space.norm(noise))
    return noise.add_(vector, alpha=1.0 / norm) if norm else noise


def _overlooked(bounds: OverlookedBounds, values: Tensor, chosen: Tensor, largest: int, smallest: int) -> Tensor:
    """How far beyond each chosen value another may lie that should have been chosen instead, (chosen,)."""
    distances, top, bottom = [], 0, 0
    for place, value in enumerate(values[chosen].tolist()):
        if place < largest:
            distances.append(bounds.above(place) - value)
        elif place < largest + smallest:
            distances.append(value - bounds.below(place - largest))
        else:
            # Of the ones before it, ``top`` are from the upper end and ``bottom`` from the lower.
            distances.append(max(bounds.above(top), -bounds.below(bottom)) - abs(value))
            top, bottom = top + (value > 0.0), bottom + (value <= 0.0)
    return torch.tensor(distances, dtype=torch.float64)


def _check(space: VectorSpace, largest: int, smallest: int, magnitude: int, tolerance: float, max_matvecs: int) -> None:
    wanted = largest + smallest + magnitude
    if min(largest, smallest, magnitude) < 0 or wanted < 1:
        raise ValueError(
            f"largest, smallest and magnitude must count at least one eigenpair, got {largest}, {smallest} and "
            f"{magnitude}: give largest=1 for the largest eigenvalue."
        )
    if wanted >= space.dimension:
        raise ValueError(
            f"the number of eigenpairs must be below the number of parameters, got {wanted} of {space.dimension}: for "
            "all of them build the matrix and call torch.linalg.eigh."
        )
    if not 0.0 < tolerance < 1.0:
        raise ValueError(f"tolerance must lie between 0 and 1, got {tolerance}: 1e-3 gives an eigenvalue to 3 digits.")
    if max_matvecs < wanted:
        raise ValueError(
            f"max_matvecs must be at least the number of eigenpairs, got {max_matvecs} for {wanted}: allow 20 for each."
        )


def _choose(values: Tensor, largest: int, smallest: int, magnitude: int) -> Tensor:
    """Indices of the wanted among Ritz values in descending order."""
    count = len(values)
    by_magnitude = values.abs().argsort(descending=True, stable=True)[:magnitude]
    ends = [*range(largest), *range(count - 1, count - 1 - smallest, -1)]
    return torch.cat([torch.tensor(ends, dtype=torch.long), by_magnitude])


def _choose_kept(values: Tensor, largest: int, smallest: int, magnitude: int, capacity: int) -> Tensor:
    """Indices of the Ritz values that a restart keeps: the wanted, and the next ones at the same ends."""
    room = max(largest + smallest + 2 * magnitude, int(_KEPT_SHARE * capacity))
    room = min(room, len(values) - 1)
    top, bottom = largest + magnitude, smallest + magnitude
    upper = max(top, round(room * top / (top + bottom)))
    lower = min(max(bottom, room - upper), len(values) - upper)
    return torch.tensor([*range(upper), *range(len(values) - lower, len(values))], dtype=torch.long)
