"""Sample growth from dense derivatives, and from losses that are exactly quadratic. Float64 throughout."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Loss = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Quadratics:
    """Losses ℓ_i(w) = b_i + ½ (w − m_i)ᵀ Q_i (w − m_i).

    Attributes:
        offsets: b, (n,).
        centres: m, (n, N).
        matrices: Q, (n, N, N) symmetric.
    """

    offsets: Tensor
    centres: Tensor
    matrices: Tensor

    def losses(self, w: Tensor) -> Tensor:
        """All losses at a point, (n,)."""
        away = w - self.centres
        return self.offsets + 0.5 * torch.einsum("ni,nij,nj->n", away, self.matrices, away)

    def gradients(self, w: Tensor) -> Tensor:
        """(n, N)."""
        return torch.einsum("nij,nj->ni", self.matrices, w - self.centres)


def random_quadratics(samples: int, size: int, seed: int = 0, scatter: float = 1.0) -> Quadratics:
    """Independent samples about one mean landscape, whose Hessian has eigenvalues of both signs."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    basis = torch.linalg.qr(normal(size, size))[0]
    mean = basis @ torch.diag(torch.linspace(6.0, -2.0, size, dtype=torch.float64)) @ basis.T
    noise = scatter * normal(samples, size, size) / size**0.5
    return Quadratics(normal(samples), normal(samples, size), mean + 0.5 * (noise + noise.mT))


def order_of(samples: int, seed: int = 0) -> list[int]:
    """The order of samples that follows from a seed: each place changes with a later one, drawn in turn."""
    draw, order = random.Random(seed), list(range(samples))
    for place in range(samples):
        other = draw.randrange(place, samples)
        order[place], order[other] = order[other], order[place]
    return order


@dataclass(frozen=True)
class Increment:
    """a, c, B of the step from k to k + 1 samples, by the difference of both means."""

    a: Tensor
    c: Tensor
    b: Tensor

    def within(self, basis: Tensor) -> Increment:
        """In the columns of a basis, (N, D)."""
        return Increment(self.a, basis.T @ self.c, basis.T @ self.b @ basis)


def dense_increment(losses: Loss, w: Tensor, k: int, new: int | None = None) -> Increment:
    """Differentiate the means over k and k + 1 samples, of which the last is ``new`` (default: the k-th)."""
    chosen = [*range(k), k if new is None else new]

    def difference(point: Tensor) -> Tensor:
        values = losses(point)
        return values[chosen].mean() - values[:k].mean()

    w = w.detach().double()
    gradient = torch.autograd.functional.jacobian(difference, w)
    return Increment(difference(w).detach(), gradient, torch.autograd.functional.hessian(difference, w))


def mean_hessian(losses: Loss, w: Tensor, k: int) -> Tensor:
    """∇²L_k, (N, N)."""
    return torch.autograd.functional.hessian(lambda point: losses(point)[:k].mean(), w.detach().double())


def top_eigenvectors(hessian: Tensor, count: int) -> Tensor:
    """Eigenvectors of the algebraically largest eigenvalues, (N, count), the largest first."""
    return torch.linalg.eigh(hessian).eigenvectors.flip(1)[:, :count]


def gaussian_mean(function: Callable[[Tensor], Tensor], dimension: int, sigma: float, nodes: int = 5) -> Tensor:
    """E f(z), z ~ N(0, σ²I), by Gauss–Hermite quadrature: exact for polynomials up to degree 2·nodes − 1."""
    points, weights = np.polynomial.hermite_e.hermegauss(nodes)
    weights = weights / weights.sum()
    total = torch.zeros((), dtype=torch.float64)
    for indices in itertools.product(range(nodes), repeat=dimension):
        z = sigma * torch.tensor([points[i] for i in indices], dtype=torch.float64)
        total = total + float(np.prod([weights[i] for i in indices])) * function(z)
    return total
