"""The directions in which the loss is probed: an orthonormal basis, and the Hessian of the first k samples in it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_curvature.linalg import VectorSpace, eigenpairs
from lightning_curvature.linalg.space import pairwise_dots
from lightning_curvature.operators import CurvatureOperator
from lightning_curvature.stabilization.options import Law

# Random vectors that a search without start vectors begins with. One finds every eigenvalue once; with more, the basis
# grows wider and less deep: a GPT took 1.3 times the products for 16 pairs with a block of 16.
_BLOCK = 2


@dataclass(frozen=True)
class Subspace:
    """Directions that are probed.

    Attributes:
        basis: U as rows, (D, n).
        curvature: UᵀHU of the mean over the first k samples, (D, D) float64.
        converged: whether the directions are what was asked for.
        residual: largest ‖Hu − λu‖ over the largest |λ|, of eigenvectors; 0 for given directions.
        products: how many products they took.
    """

    basis: Tensor
    curvature: Tensor
    converged: bool
    residual: float
    products: int


def eigen_subspace(
    operator: CurvatureOperator,
    dimension: int,
    law: Law,
    *,
    tolerance: float,
    max_products: int,
    start: Sequence[Tensor],
    generator: torch.Generator,
    on_product: Callable[[], None],
) -> Subspace:
    """Return the eigenvectors of the largest eigenvalues, or of the smallest: algebraically, the first first.

    A dominant negative eigenvalue is not among the largest.

    Args:
        operator: products with the mean Hessian.
        dimension: D.
        law: "top" or "bottom".
        tolerance: relative residual.
        max_products: give up after as many.
        start: eigenvectors of a neighbouring Hessian.
        generator: of random vectors.
        on_product: called after every product.
    """

    def matvec(vector: Tensor) -> Tensor:
        product = operator(vector)
        on_product()
        return product

    pairs = eigenpairs(
        matvec,
        operator.space,
        largest=dimension * (law == "top"),
        smallest=dimension * (law == "bottom"),
        tolerance=tolerance,
        max_matvecs=max_products,
        max_basis=3 * dimension + 16,
        start=start,
        block_size=min(_BLOCK, dimension),
        generator=generator,
    )
    # Ritz vectors: UᵀHU is diagonal and known, whether they have converged or not.
    residual = float(pairs.residuals.max() / pairs.values.abs().max())
    return Subspace(torch.stack(pairs.vectors), torch.diag(pairs.values), all(pairs.converged), residual, pairs.matvecs)


def given_subspace(operator: CurvatureOperator, vectors: Tensor, on_product: Callable[[], None]) -> Subspace:
    """Return the span of vectors (D, n), one after the other, with D products for the Hessian in it.

    Raises:
        ValueError: if they are linearly dependent.
    """
    basis = orthonormal(operator.space, vectors)
    products = []
    for row in basis:
        products.append(operator(row))
        on_product()
    curvature = pairwise_dots(basis, torch.stack(products))
    return Subspace(basis, 0.5 * (curvature + curvature.mT), True, 0.0, len(basis))


def orthonormal(space: VectorSpace, vectors: Tensor) -> Tensor:
    """Orthonormalize the rows, each against those before it, twice; (D, n).

    Raises:
        ValueError: if one is (nearly) a combination of those before it.
    """
    rows = vectors.to(space.dtype).clone()
    rounding = 64.0 * torch.finfo(space.dtype).eps
    for index, row in enumerate(rows):
        before = space.norm(row)
        for _ in range(2):
            row -= (space.dots([rows[:index]], row).to(rows.dtype) @ rows[:index]) if index else 0.0
            length = space.norm(row)
            if not length > rounding * before:
                raise ValueError(
                    f"directions must be linearly independent, got a vector {index} that the ones before it span: "
                    "give fewer, or others."
                )
            row /= length
            before = 1.0
    return rows
