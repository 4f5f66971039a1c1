"""Symmetric matrices with a given spectrum, as matvecs that count, in float64 unless asked otherwise."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_curvature.linalg import VectorSpace


class Operator:
    """v ↦ Av that counts its products and keeps what it was given and what it returned.

    Args:
        matrix: A.
        dtype: of the products; ``values`` and ``vectors`` are float64 in any case.
    """

    def __init__(self, matrix: Tensor, dtype: torch.dtype = torch.float64) -> None:
        self.matrix = matrix.to(dtype)
        self.space = VectorSpace([self.matrix[0]])
        self.products = 0
        self.norms: list[float] = []
        self.returned: list[tuple[Tensor, Tensor]] = []

    def __call__(self, vector: Tensor) -> Tensor:
        self.products += 1
        self.norms.append(float(vector.double().norm()))
        product = self.matrix @ vector
        self.returned.append((product, product.clone()))
        return product

    def eigh(self) -> tuple[Tensor, Tensor]:
        """All eigenvalues, descending, and their vectors as columns."""
        values, vectors = torch.linalg.eigh(self.matrix.double())
        return values.flip(0), vectors.flip(1)


def rotation(n: int, seed: int = 0) -> Tensor:
    """Random orthogonal matrix."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))[0]


def with_spectrum(values: Sequence[float] | Tensor, seed: int = 0, dtype: torch.dtype = torch.float64) -> Operator:
    """Operator with these eigenvalues and random eigenvectors."""
    values = torch.as_tensor(values, dtype=torch.float64)
    q = rotation(len(values), seed)
    matrix = (q * values) @ q.T
    return Operator((matrix + matrix.T) / 2.0, dtype)


def with_bulk(outliers: Sequence[float], n: int = 120, width: float = 1.0, seed: int = 0) -> Tensor:
    """Eigenvalues: the outliers, and as many as are missing, even in ±width."""
    generator = torch.Generator().manual_seed(seed)
    bulk = width * (2.0 * torch.rand(n - len(outliers), dtype=torch.float64, generator=generator) - 1.0)
    return torch.cat([torch.tensor(outliers, dtype=torch.float64), bulk])
