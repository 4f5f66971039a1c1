"""Where a Krylov space may have overlooked an eigenvalue: probabilistic bounds from its random start."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Bounds hold with 95 % probability.
_FAILURE = 0.05

# The crossing is looked for between the distance at which it can be excluded and 2^-64 of that, where float64 has long
# ended: on 65 points a factor of 2 apart, then on 65 between two of those, a factor of 1.01 apart. What is reported is
# the outer one of the last two: the bound is up to 1.1 % of its distance to the Ritz value too wide.
_POINTS = 64


@dataclass(frozen=True)
class _Stage:
    """Ritz values θ of a basis between two restarts, what they couple to, and their parts along its first rows."""

    values: Tensor  # (d,), descending
    couplings: Tensor  # (waiting rows, d)
    weights: Tensor  # (d, rows): of the first row, after a restart of the rows that waited then, as far as multiplied


class OverlookedBounds:
    r"""Bounds on eigenvalues that a Krylov space has not found, from the randomness of its first vector.

    The basis V was multiplied, the rows Q wait: AV = VT + QB. For a unit eigenvector v of eigenvalue λ, y = Vᵀv and
    c = Qᵀv that says yᵀ(λ − T) = cᵀB with ‖c‖ ≤ 1. With T = U diag(θ) Uᵀ and b the first row of V,

    .. math:: |v \cdot b| = |y^\top e_1| \le f(\lambda),
        \qquad f(t) = \Bigl\lVert \sum_i \frac{(Bu_i)\,(u_i \cdot e_1)}{t - \theta_i} \Bigr\rVert .

    But b is random, and v knows nothing of it. If b = (w + a r)/‖w + a r‖ with ‖w‖ ≤ 1 and r uniform on the unit sphere
    of N ≥ 3 dimensions, then v·r has a density of at most √(N/2π), so that, whatever w is,

    .. math:: P(|v \cdot b| < \delta) \le 0.05 \quad\text{for}\quad
        \delta = 0.05 \sqrt{\frac{\pi}{2N}}\, \frac{a}{1 + a},

    where a/(1+a) is 1 without w. Let v belong to the largest eigenvalue: with 95 % probability it is not above the
    largest t with f(t) ≥ δ, nor then any other, unless it is not above the largest θ. The 5 % are over the draw of r.
    Nothing is neglected but the noise of the products.

    Beyond the first, f without the terms of the j largest θ bounds the eigenvalue number j + 1. That takes the j
    eigenvectors for exactly those: it is a rule, not a theorem, and blind to further copies of the same eigenvalues.

    After a thick restart c is made of components along rows of the new basis: it is to that what v·b was to the old
    one, and f is the norm of the product of the matrices. So the bound goes on to shrink.

    Args:
        dimension: N.
        random_part: a/(1 + a); 1 for a first row that is random altogether.

    Source: van Dorsselaer, Hochstenbach and van der Vorst 2000 (one random start vector, T tridiagonal); blocks, start
    vectors that are random in part, and restarts are ours.

    Example:
        >>> bounds = OverlookedBounds(dimension=4)
        >>> projected = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)  # and 0.1 to the row that waits
        >>> values, vectors = torch.linalg.eigh(projected)
        >>> bounds.update(values.flip(0), vectors.flip(1), 0.1 * vectors.flip(1)[1:])
        >>> exact = math.sqrt(1.0 + 0.1 / bounds.threshold)  # f(t) = 0.1/(t² − 1)
        >>> 1.0 < (bounds.above(0) - 1.0) / (exact - 1.0) < 1.02
        True
    """

    def __init__(self, dimension: int, random_part: float = 1.0) -> None:
        self.threshold = _FAILURE * math.sqrt(math.pi / (2.0 * dimension)) * random_part
        self._past: list[_Stage] = []
        self._now: _Stage | None = None
        # The first row of the basis.
        self._first, self._rows = 0, 1

    def update(self, values: Tensor, vectors: Tensor, couplings: Tensor) -> None:
        """Take up the basis as it is.

        Args:
            values: θ, (d,) float64, descending.
            vectors: U, (d, d).
            couplings: BU, (waiting rows, d).
        """
        rows = vectors[self._first : self._first + self._rows]
        self._now = _Stage(values, couplings, rows.T)

    def restart(self, kept: int) -> None:
        """Go on after a restart from so many of the Ritz vectors, followed by the rows that wait."""
        assert self._now is not None
        self._past.append(self._now)
        self._first, self._rows = kept, len(self._now.couplings)

    def above(self, place: int) -> float:
        """With 95 % probability at most ``place`` eigenvalues are larger."""
        return self._bound(place, 1.0)

    def below(self, place: int) -> float:
        """With 95 % probability at most ``place`` eigenvalues are smaller."""
        return -self._bound(place, -1.0)

    def _bound(self, place: int, sign: float) -> float:
        assert self._now is not None
        stages = [_beyond(stage, place, sign) for stage in (*self._past, self._now)]
        # Poles of f: a restart may have dropped the vector of the outermost.
        base = torch.stack([stage.values[0] for stage in stages]).max()
        # At this distance the first factor of f is below half of the threshold, and the others are at most little above
        # 1, which they are for rows that have not been multiplied.
        distance = 2.0 * max(float(stage.couplings.norm() * stage.weights.norm()) for stage in stages) / self.threshold
        for factor in (2.0, 2.0 ** (1.0 / _POINTS)):
            distances = distance * factor ** -torch.arange(_POINTS + 1, dtype=torch.float64)
            crossed = (_transfer(stages, base, distances) >= self.threshold).nonzero()
            if distance == 0.0 or not len(crossed):
                # An invariant subspace: nothing waits, or what waits has no part of the first row.
                return float(base)
            distance = float(distances[max(int(crossed[0]) - 1, 0)])
        return float(base) + distance


def _beyond(stage: _Stage, place: int, sign: float) -> _Stage:
    """The stage without the outermost of its values at one end, with the others descending towards the other end."""
    values, couplings, weights = stage.values, stage.couplings, stage.weights
    if sign < 0.0:
        values, couplings, weights = -values.flip(0), couplings.flip(1), weights.flip(0)
    return _Stage(values[place:], couplings[:, place:], weights[place:])


def _transfer(stages: list[_Stage], base: Tensor, distances: Tensor) -> Tensor:
    """The function f at ``base`` + ``distances``, (points,)."""
    along = torch.ones(1, len(distances), dtype=torch.float64)
    for stage in stages:
        multiplied = stage.weights.shape[1]
        gaps = (base - stage.values)[:, None] + distances
        waiting = along[multiplied:]
        along = stage.couplings @ ((stage.weights @ along[:multiplied]) / gaps)
        # Rows that waited when the stage began and still do are the first of those that wait.
        along[: len(waiting)] += waiting
    return along.norm(dim=0)
