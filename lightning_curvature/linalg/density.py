"""Density of the eigenvalues of a symmetric operator: stochastic Lanczos quadrature."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_curvature.arguments import MANY, checked, positive, shaped, whole
from lightning_curvature.linalg.eigenpairs import Eigenpairs
from lightning_curvature.linalg.krylov import KrylovSpace, MatVec
from lightning_curvature.linalg.space import VectorSpace

# A node with a weight up to this many N-ths may be a single eigenvalue: the square of one coordinate of a random unit
# vector is χ²/N with one degree of freedom, above 10/N in 0.2 % of cases.
_SINGLE = 10.0
# m Lanczos nodes in an interval of length R lie at most about h = πR/(2m) apart, like Chebyshev points. Gaussians of
# deviation h/2 at that distance add up to a line that is flat to 2·exp(−2π²/4) = 1.4 %; narrower ones show the nodes.
_WIDTH = math.pi / 4.0
# No default width is finer than this share of the whole range, so that this many points show everything.
_FINEST = 1e-3
_POINTS = 1200
# The grid extends this many widths beyond the outermost nodes, where a Gaussian has 3e-7 left.
_MARGIN = 5.0

_POWER = whole(0, "1 gives the trace over N")
_GIVEN_WIDTH = positive("leave it out for what the nodes resolve")


@dataclass(frozen=True)
class SpectralDensity:
    r"""Density of the eigenvalues as nodes and weights: one quadrature rule for each random start.

    .. math:: \varphi(x) = \frac1N \sum_i \delta(x - \lambda_i) \approx
        \frac1S \sum_s \sum_j w_{sj}\, \delta(x - x_{sj})

    Attributes:
        nodes: (starts, m) float64 on the CPU; known eigenvalues first, then the nodes of the chain, descending.
        weights: (starts, m), each row sums to 1; 0 where a chain ended early.
        dimension: N.
        deflated: number of known eigenvalues among the nodes.
    """

    nodes: Tensor
    weights: Tensor
    dimension: int
    deflated: int
    matvecs: int

    @checked(power=_POWER)
    def moment(self, power: int) -> float:
        r"""Estimate :math:`\operatorname{tr}(A^p)/N`."""
        return float(self._moments(power).mean())

    @checked(power=_POWER)
    def moment_error(self, power: int) -> float:
        """Return the moment's standard error, from the scatter of the starts; NaN for one start."""
        moments = self._moments(power)
        return float(moments.std()) / math.sqrt(len(moments)) if len(moments) > 1 else math.nan

    def _moments(self, power: int) -> Tensor:
        return (self.weights * self.nodes**power).sum(dim=1)

    def default_width(self) -> float:
        """Return the finest width of a Gaussian that the number of nodes resolves."""
        nodes, weights = self.nodes[:, self.deflated :], self.weights[:, self.deflated :]
        bulk = nodes[weights > min(_SINGLE / self.dimension, float(weights.max()) / 2.0)]
        # Without a remainder the chain has no nodes of weight.
        spacing = _WIDTH * _extent(bulk) / max(nodes.shape[1], 1)
        return max(spacing, _FINEST * _extent(self.nodes)) or _FINEST * (float(self.nodes.abs().max()) or 1.0)

    @checked(width=_GIVEN_WIDTH, points=whole(1, "1200 show everything", MANY))
    def grid(self, width: float | None = None, points: int = _POINTS) -> Tensor:
        """Return evenly spaced places, (points,), that cover the density smoothed with that width."""
        margin = _MARGIN * self._width(width)
        low, high = float(self.nodes.min()) - margin, float(self.nodes.max()) + margin
        return torch.linspace(low, high, points, dtype=torch.float64)

    @checked(grid=shaped("points", "grid() makes it"), width=_GIVEN_WIDTH)
    def evaluate(self, grid: Tensor, width: float | None = None) -> Tensor:
        """Return the density at the places of a grid, (points,), smoothed by a Gaussian; it integrates to 1.

        ``width`` is the standard deviation; default: :meth:`default_width`. :meth:`grid` gives the places for it.
        """
        width = self._width(width)
        nodes, weights = self.nodes.flatten(), self.weights.flatten() / len(self.nodes)
        bells = torch.exp(-0.5 * ((grid.double().unsqueeze(1) - nodes) / width).square())
        return bells @ weights / (width * math.sqrt(2.0 * math.pi))

    @checked(bins=whole(1, "100 make a good picture", MANY))
    def histogram(self, bins: int = 100) -> tuple[Tensor, Tensor]:
        """Return edges, (bins + 1,), and the shares of the eigenvalues between them, (bins,), which sum to 1."""
        low, high = float(self.nodes.min()), float(self.nodes.max())
        if low == high:
            half = _FINEST * (abs(low) or 1.0)
            low, high = low - half, high + half
        edges = torch.linspace(low, high, bins + 1, dtype=torch.float64)
        weights = self.weights.flatten() / len(self.nodes)
        return edges, torch.histogram(self.nodes.flatten(), edges, weight=weights).hist

    def _width(self, width: float | None) -> float:
        return self.default_width() if width is None else width


@checked(starts=whole(1, "3 make a good picture", MANY), steps=whole(1, "30 make a good picture", MANY))
def spectral_density(
    matvec: MatVec,
    space: VectorSpace,
    *,
    starts: int = 3,
    steps: int = 30,
    deflation: Eigenpairs | None = None,
    generator: torch.Generator | None = None,
) -> SpectralDensity:
    r"""Estimate the density of the eigenvalues of a symmetric operator by stochastic Lanczos quadrature.

    The eigenvalues x_j of the Lanczos matrix of a unit vector v, and the squares w_j of the first components of its
    eigenvectors, are the Gauss rule of v's spectral measure:

    .. math:: v^\top A^p v = \sum_j w_j x_j^p \quad (p \le 2 \cdot \text{steps} - 1), \qquad
        \operatorname{E}[v^\top A^p v] = \operatorname{tr}(A^p) / N

    A random v gives an isolated eigenvalue the weight χ²/N, between nothing and several N-ths. Known eigenvalues enter
    with 1/N each, and v is orthogonal to their vectors: the outliers then have their true weight, and the chain spends
    its steps on the rest.

    Args:
        matvec: v ↦ Av, in a new tensor; called on every rank.
        space: the space of v.
        starts: number of random vectors; in large spaces one suffices, two give an error.
        steps: products for each, which set the resolution.
        deflation: Ritz pairs of the same operator, of :func:`eigenpairs`; their residuals are errors of the density.
        generator: of the random vectors, on the device of the space; default: seed 0.

    Raises:
        ValueError: if an argument is out of range.
        NonFiniteProductError: if a product is not finite.

    Source: Golub and Meurant 2010; Ghorbani, Krishnan and Xiao 2019.

    Example:
        >>> diagonal = torch.tensor([-10.0, 5.0, 3.0, 3.0], dtype=torch.float64)
        >>> density = spectral_density(lambda v: diagonal * v, VectorSpace([diagonal]), starts=2, steps=3)
        >>> density.nodes.round(decimals=9)
        tensor([[  5.,   3., -10.],
                [  5.,   3., -10.]], dtype=torch.float64)
        >>> round(density.moment(0), 9), tuple(share.shape for share in density.histogram(4))
        (1.0, (torch.Size([5]), torch.Size([4])))
    """
    generator = generator or torch.Generator(space.device).manual_seed(0)
    rules = [_rule(matvec, space, steps, deflation, generator) for _ in range(starts)]
    length = max(len(nodes) for nodes, *_ in rules)
    return SpectralDensity(
        # A chain that ended early is padded with its last node, at weight 0.
        nodes=torch.stack([torch.cat([n, n[-1:].expand(length - len(n))]) for n, *_ in rules]),
        weights=torch.stack([torch.cat([w, w.new_zeros(length - len(w))]) for _, w, *_ in rules]),
        dimension=space.dimension,
        deflated=rules[0][2],
        matvecs=sum(matvecs for *_, matvecs in rules),
    )


def _rule(
    matvec: MatVec, space: VectorSpace, steps: int, deflation: Eigenpairs | None, generator: torch.Generator
) -> tuple[Tensor, Tensor, int, int]:
    """Return nodes and weights of one start, the number of known eigenvalues before them, and of products made."""
    krylov = KrylovSpace(matvec, space)
    if deflation is not None:
        krylov.deflate(deflation.quotients, deflation.vectors)
    known = krylov.done
    krylov.add(space.random(generator))
    while krylov.matvecs < steps and krylov.done < len(krylov.basis):
        krylov.step()
    chain = slice(known, krylov.done)
    values, vectors = torch.linalg.eigh(krylov.projected[chain, chain])
    rest = (1.0 - known / space.dimension) * vectors[:1].flatten().square().flip(0)
    nodes = torch.cat([krylov.projected.diagonal()[:known], values.flip(0)])
    weights = torch.cat([torch.full((known,), 1.0 / space.dimension, dtype=torch.float64), rest])
    return nodes, weights, known, krylov.matvecs


def _extent(nodes: Tensor) -> float:
    return float(nodes.max() - nodes.min()) if nodes.numel() else 0.0
