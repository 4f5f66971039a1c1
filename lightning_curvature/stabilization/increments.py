"""The increment of each new sample at one k, and its quadratic model in the subspace."""

import torch
from torch import Tensor

from lightning_curvature.functional import QuadraticIncrement, increment
from lightning_curvature.linalg.space import pairwise_dots
from lightning_curvature.operators import CurvatureOperator
from lightning_curvature.stabilization.problem import StabilizationProblem
from lightning_curvature.stabilization.subspace import Subspace


def increments_at(problem: StabilizationProblem, k: int) -> Tensor:
    """Return a of each new sample alone, (candidates,) float64: no derivatives."""
    new = problem.new(k)

    def fill(table: Tensor) -> None:
        table[-1] = problem.mean_loss(k)
        if held := problem.losses.samples.among(new):
            with torch.no_grad():
                table[[number - k for number in held]] = problem.losses.each(held).double()

    table = problem.together(problem.zeros(len(new) + 1), fill)
    return increment(table[:-1], table[-1], k)


def increment_model(
    problem: StabilizationProblem, k: int, operator: CurvatureOperator, subspace: Subspace | None
) -> tuple[QuadraticIncrement, Tensor]:
    r"""Return a, c and B of each new sample, and ‖∇L_{k+1} − ∇L_k‖² in the full space, (candidates,) float64.

    .. math:: B = \frac{U^\top \nabla^2\ell\, U - U^\top \nabla^2 L_k\, U}{k + 1}

    takes D products with the one new sample: the search for U has made the second term.

    Source: Curvature-aligned probing (2026), eqs. 7 and 12, which multiplies with both means; see docs/references.md.
    """
    new, basis = problem.new(k), problem.space.zeros(0) if subspace is None else subspace.basis
    dimension = len(basis)
    gradient = operator.gradient()

    def fill(table: Tensor) -> None:
        if operator.error is not None:  # this rank failed to make a product before
            raise operator.error
        table[-1, 0] = problem.mean_loss(k)
        for number in problem.losses.samples.among(new):
            table[number - k] = _of_sample(problem, number, gradient, basis)

    # For each new sample ℓ, ‖∇ℓ − ∇L_k‖², Uᵀ∇ℓ and UᵀhU; in the last row, L_k.
    table = problem.together(problem.zeros(len(new) + 1, 2 + dimension + dimension**2), fill)
    curvature = problem.zeros(0, 0) if subspace is None else subspace.curvature.to(table)
    of_sample = table[:-1, 2 + dimension :].reshape(len(new), dimension, dimension)
    model = QuadraticIncrement(
        increment(table[:-1, 0], table[-1, 0], k),
        increment(table[:-1, 2 : 2 + dimension], problem.space.dots([basis], gradient), k),
        increment(0.5 * (of_sample + of_sample.mT), curvature, k),
    )
    return model, table[:-1, 1] / (k + 1) ** 2


def _of_sample(problem: StabilizationProblem, number: int, mean_gradient: Tensor, basis: Tensor) -> Tensor:
    space, rows = problem.space, []
    with problem.sample(number) as (operator, gradient, loss):
        for vectors in basis.split(problem.vectors_at_once) if len(basis) else ():
            rows.append(pairwise_dots(operator.local_products(vectors), basis).reshape(-1))
            problem.on_product()
        square = space.squared_norm(gradient - mean_gradient)
        return torch.cat([loss.double().reshape(1), square, space.dots([basis], gradient), *rows])
