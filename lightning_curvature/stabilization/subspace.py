"""The subspace in which the loss is perturbed: an orthonormal basis, and the mean Hessian of k samples in it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_curvature.linalg import VectorSpace, eigenpairs
from lightning_curvature.linalg.space import pairwise_dots
from lightning_curvature.operators import CurvatureOperator
from lightning_curvature.stabilization.problem import StabilizationProblem

# Uses of random numbers.
_DIRECTIONS, _SIGNS = 0, 4
# Random vectors that a search without start vectors begins with. One finds every eigenvalue once; with more, the basis
# grows wider and less deep: a GPT took 1.3 times the products for 16 pairs with a block of 16.
_BLOCK = 2


@dataclass(frozen=True)
class Subspace:
    """Directions of the perturbations.

    Attributes:
        basis: U as rows, (D, n).
        curvature: UᵀHU of the mean over the first k samples, (D, D) float64.
        converged: whether the search for eigenvectors converged; True for given directions.
        residual: largest ‖Hu − λu‖ over the largest |λ|, of eigenvectors; 0 for given directions.
        products: number of products that the subspace took.
    """

    basis: Tensor
    curvature: Tensor
    converged: bool
    residual: float
    products: int


def subspace_at(
    problem: StabilizationProblem, k: int, operator: CurvatureOperator, before: Subspace | None
) -> Subspace:
    """Return the subspace at k; a search for eigenvectors starts from those ``before``, of a smaller k."""
    space, law = problem.space, problem.options.law
    if problem.directions is not None:
        return _span(problem, operator, problem.directions.to(space.device))
    if law in ("top", "bottom"):
        return _eigen_subspace(problem, operator, before)
    if law == "random":
        generator, count = problem.generator(_DIRECTIONS), problem.options.subspace_dims[0]
        return _span(problem, operator, torch.stack([space.random(generator) for _ in range(count)]))
    return _span(problem, operator, _longest_gradients(problem, k))


def _eigen_subspace(problem: StabilizationProblem, operator: CurvatureOperator, before: Subspace | None) -> Subspace:
    """Return the eigenvectors of the algebraically largest or smallest eigenvalues, the outermost first."""
    options = problem.options
    dimension = options.subspace_dims[0]

    def matvec(vector: Tensor) -> Tensor:
        product = operator(vector)
        problem.on_product()
        return product

    pairs = eigenpairs(
        matvec,
        problem.space,
        largest=dimension * (options.law == "top"),
        smallest=dimension * (options.law == "bottom"),
        residual_tolerance=options.tolerance,
        max_matvecs=options.product_limit,
        max_basis=3 * dimension + 16,
        start=[] if before is None else list(before.basis),
        block_size=min(_BLOCK, dimension),
        generator=problem.generator(_DIRECTIONS),
    )
    basis = torch.stack(pairs.vectors)
    # Rounding decides the signs of eigenvectors, and draws depend on them.
    basis.mul_(problem.space.dots([basis], problem.space.random(problem.generator(_SIGNS))).sign()[:, None])
    # Ritz vectors: UᵀHU is diagonal and known, also where they did not converge.
    residual = float(pairs.residuals.max() / pairs.quotients.abs().max())
    return Subspace(basis, torch.diag(pairs.quotients), all(pairs.converged), residual, pairs.matvecs)


def _span(problem: StabilizationProblem, operator: CurvatureOperator, vectors: Tensor) -> Subspace:
    """Return the span of vectors (D, n), which takes D products for the Hessian in it."""
    basis = _orthonormal(problem.space, vectors)
    products = []
    for row in basis:
        products.append(operator(row))
        problem.on_product()
    curvature = pairwise_dots(basis, torch.stack(products))
    return Subspace(basis, 0.5 * (curvature + curvature.mT), True, 0.0, len(basis))


def _orthonormal(space: VectorSpace, vectors: Tensor) -> Tensor:
    """Orthonormalize the rows, each against those before it, twice; raise where they are linearly dependent."""
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


def _longest_gradients(problem: StabilizationProblem, k: int) -> Tensor:
    """Return the gradients of the D samples among the first k that have the longest ones, (D, n)."""
    space, dimension = problem.space, problem.options.subspace_dims[0]

    def fill_lengths(lengths: Tensor) -> None:
        for number in problem.losses.samples.among(range(k)):
            lengths[number] = space.squared_norm(problem.gradient(number))[0]

    lengths = problem.together(problem.zeros(k), fill_lengths)
    chosen = lengths.argsort(descending=True, stable=True)[:dimension].tolist()

    def fill_gradients(rows: Tensor) -> None:
        for number in problem.losses.samples.among(chosen):
            rows[chosen.index(number)] = problem.gradient(number)

    return problem.together(space.zeros(dimension), fill_gradients)
