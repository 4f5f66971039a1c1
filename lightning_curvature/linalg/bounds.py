"""Probabilistic bounds on eigenvalues that a Krylov space has overlooked, from its random start vector."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Bounds hold with 95 % probability.
_FAILURE = 0.05

# The crossing is searched for from the distance at which it can be excluded down to 2^-64 of that: by factors of 2,
# then of 1.01. The outer one of the last two points is reported, up to 1.1 % of the distance too wide.
_POINTS = 64


@dataclass(frozen=True)
class _Stage:
    """Ritz values θ of a basis between two restarts, their couplings, and their components along its first rows."""

    values: Tensor  # (d,), descending
    couplings: Tensor  # (waiting rows, d)
    weights: Tensor  # (d, rows): of the first row; after a restart, of those rows that waited then and are multiplied


class OverlookedBounds:
    r"""Bounds on eigenvalues that a Krylov space has overlooked, from the randomness of its first vector b.

    With AV = VT + QB, where the rows Q wait, and T = U diag(θ) Uᵀ, each unit eigenvector v of eigenvalue λ satisfies
    yᵀ(λ − T) = (Qᵀv)ᵀB for y = Vᵀv, so that

    .. math:: |v \cdot b| = |y^\top e_1| \le f(\lambda),
        \qquad f(t) = \Bigl\lVert \sum_i \frac{(Bu_i)\,(u_i \cdot e_1)}{t - \theta_i} \Bigr\rVert .

    Let b = (w + a r)/‖w + a r‖ with ‖w‖ ≤ 1 and r uniform on the unit sphere of N ≥ 3 dimensions, independent of v. The
    density of v·r is at most √(N/2π), so that for every w

    .. math:: P(|v \cdot b| < \delta) \le 0.05 \quad\text{for}\quad
        \delta = 0.05 \sqrt{\frac{\pi}{2N}}\, \frac{a}{1 + a} .

    With v of the largest eigenvalue: with 95 % probability over r, and up to the noise of the products, no eigenvalue
    exceeds both the largest θ and the largest t with f(t) ≥ δ. For eigenvalue number j + 1, f omits the terms of the j
    largest θ. This takes their vectors as exact: it is a rule, not a theorem, and blind to further copies of the same
    eigenvalues. After a thick restart f is the norm of a product of matrices, one for each basis.

    Args:
        dimension: N.
        random_part: a/(1 + a); 1 for a first row that is random altogether.

    Source: van Dorsselaer, Hochstenbach and van der Vorst 2000 (one random start vector, T tridiagonal); blocks, partly
    random start vectors and restarts are an extension of it.

    Example:
        >>> bounds = OverlookedBounds(dimension=4)
        >>> projected = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)  # and 0.1 to the waiting row
        >>> values, vectors = torch.linalg.eigh(projected)
        >>> bounds.update(values.flip(0), vectors.flip(1), 0.1 * vectors.flip(1)[1:])
        >>> exact = math.sqrt(1.0 + 0.1 / bounds.threshold)  # f(t) = 0.1/(t² − 1)
        >>> 1.0 < (bounds.above(0) - 1.0) / (exact - 1.0) < 1.02
        True
    """

    def __init__(self, dimension: int, random_part: float = 1.0) -> None:
        self.threshold = _FAILURE * math.sqrt(math.pi / (2.0 * dimension)) * random_part
        self._stages: list[_Stage] = []
        # Rows of the present basis along which the components are known, and whether its stage is in the list.
        self._first, self._rows, self._begun = 0, 1, False

    def update(self, values: Tensor, vectors: Tensor, couplings: Tensor) -> None:
        """Take the present θ, descending, U and BU, as :meth:`~.krylov.KrylovSpace.ritz` returns them."""
        rows = vectors[self._first : self._first + self._rows]
        if self._begun:
            self._stages.pop()
        self._stages.append(_Stage(values, couplings, rows.T))
        self._begun = True

    def restart(self, kept: int) -> None:
        """Continue after a restart from ``kept`` of the Ritz vectors, followed by the waiting rows."""
        self._first, self._rows, self._begun = kept, len(self._stages[-1].couplings), False

    def above(self, place: int) -> float:
        """Return a number that at most ``place`` eigenvalues exceed, with 95 % probability."""
        return self._bound([_Stage(s.values[place:], s.couplings[:, place:], s.weights[place:]) for s in self._stages])

    def below(self, place: int) -> float:
        """Return a number that at most ``place`` eigenvalues fall below, with 95 % probability."""
        flipped = [(-s.values.flip(0), s.couplings.flip(1), s.weights.flip(0)) for s in self._stages]
        return -self._bound([_Stage(v[place:], c[:, place:], w[place:]) for v, c, w in flipped])

    def _bound(self, stages: list[_Stage]) -> float:
        # Poles of f: a restart may have dropped the vector of the outermost.
        base = torch.stack([stage.values[0] for stage in stages]).max()
        # At this distance the first factor of f is below half of the threshold, and the others hardly exceed 1.
        distance = 2.0 * max(float(stage.couplings.norm() * stage.weights.norm()) for stage in stages) / self.threshold
        for factor in (2.0, 2.0 ** (1.0 / _POINTS)):
            distances = distance * factor ** -torch.arange(_POINTS + 1, dtype=torch.float64)
            crossed = (_transfer(stages, base, distances) >= self.threshold).nonzero()
            if distance == 0.0 or not len(crossed):
                # An invariant subspace: no row waits, or the waiting ones have no component of the first row.
                return float(base)
            distance = float(distances[max(int(crossed[0]) - 1, 0)])
        return float(base) + distance


def _transfer(stages: list[_Stage], base: Tensor, distances: Tensor) -> Tensor:
    """Return f at ``base`` + ``distances``, (points,)."""
    along = torch.ones(1, len(distances), dtype=torch.float64)
    for stage in stages:
        multiplied = stage.weights.shape[1]
        gaps = (base - stage.values)[:, None] + distances
        waiting = along[multiplied:]
        along = stage.couplings @ ((stage.weights @ along[:multiplied]) / gaps)
        # Rows that waited when the stage began and still do are the first of the waiting rows.
        along[: len(waiting)] += waiting
    return along.norm(dim=0)
