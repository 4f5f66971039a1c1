"""The subspace that is probed at one k, and the quadratic model of the increment in it."""

import torch
from torch import Tensor

from lightning_curvature.functional import QuadraticIncrement, increment
from lightning_curvature.linalg.space import pairwise_dots
from lightning_curvature.operators import HessianOperator
from lightning_curvature.operators.graphs import products_with
from lightning_curvature.operators.micro_batches import building_graphs
from lightning_curvature.stabilization.problem import GrowthTools
from lightning_curvature.stabilization.subspace import Subspace, eigen_subspace, given_subspace


def subspace_at(
    tools: GrowthTools, k: int, operator: HessianOperator, directions: Tensor | None, before: Subspace | None
) -> Subspace:
    """Return the directions that are probed.

    Args:
        tools: of the measurement.
        k: samples before the new one.
        operator: products with their mean Hessian.
        directions: to be spanned in place of those of the law, (D, n), or None.
        before: the subspace of a smaller k.
    """
    options, dimension, generator = tools.options, tools.options.subspace_dims[0], tools.generator(0)
    if directions is not None:
        return given_subspace(operator, directions.to(tools.space.device), tools.on_product)
    if options.law in ("top", "bottom"):
        found = eigen_subspace(
            operator,
            dimension,
            options.law,
            tolerance=options.tolerance,
            max_products=options.max_products,
            # The mean over more samples has nearly the same eigenvectors.
            start=[] if before is None else list(before.basis),
            generator=generator,
            on_product=tools.on_product,
        )
        # The signs of eigenvectors are those of rounding, and draws tell them apart.
        found.basis.mul_(tools.space.dots([found.basis], tools.space.random(tools.generator(4))).sign()[:, None])
        return found
    if options.law == "random":
        vectors = torch.stack([tools.space.random(generator) for _ in range(dimension)])
    else:
        vectors = _influential_gradients(tools, k, dimension)
    return given_subspace(operator, vectors, tools.on_product)


def _influential_gradients(tools: GrowthTools, k: int, dimension: int) -> Tensor:
    """Gradients of the D samples among the first k that have the longest ones, (D, n)."""
    space, own = tools.space, tools.samples.own

    def own_lengths() -> Tensor:
        lengths = tools.numbers(k)
        for number in tools.samples.among(range(k)):
            lengths[number] = space.squared_norm(space.pack(tools.gradients(number)[1]))[0]
        return lengths

    lengths = tools.together(own_lengths, tools.numbers(k))
    chosen = lengths.argsort(descending=True, stable=True)[:dimension].tolist()

    def own_gradients() -> Tensor:
        rows = space.zeros(dimension)
        for row, number in enumerate(chosen):
            if number in own:
                rows[row] = space.pack(tools.gradients(number)[1])
        return rows

    return tools.together(own_gradients, space.zeros(dimension))


def increments_at(tools: GrowthTools, k: int) -> Tensor:
    """Return a of each new sample alone, (candidates,) float64: no derivatives."""
    new = tools.new(k)

    def own_part() -> Tensor:
        table = tools.numbers(len(new) + 1)
        table[-1] = tools.mean_loss(k)
        own = tools.samples.among(new)
        if own:
            with torch.no_grad():
                table[[number - k for number in own]] = tools.losses.each(own).double()
        return table

    table = tools.together(own_part, tools.numbers(len(new) + 1))
    return increment(table[:-1], table[-1], k)


def increment_model(
    tools: GrowthTools, k: int, operator: HessianOperator, subspace: Subspace | None
) -> tuple[QuadraticIncrement, Tensor]:
    r"""Return a, c and B of each new sample, and ‖∇L_{k+1} − ∇L_k‖² in the full space.

    .. math:: B = \frac{U^\top \nabla^2\ell\, U - U^\top \nabla^2 L_k\, U}{k + 1}

    takes D products with the one new sample: the second term is known from the search for U.

    Returns:
        The model, of as many increments as there are new samples, and (candidates,) float64.

    Source: P1, eqs. 7 and 12, which multiplies with both means.
    """
    new, basis = tools.new(k), tools.space.zeros(0) if subspace is None else subspace.basis
    dimension = len(basis)
    gradient = operator.gradient()
    # For each new sample ℓ, ‖∇ℓ − ∇L_k‖², Uᵀ∇ℓ and UᵀhU; in the last row, L_k.
    shape = (len(new) + 1, 2 + dimension + dimension**2)

    def own_part() -> Tensor:
        table = tools.numbers(*shape)
        table[-1, 0] = tools.mean_loss(k)
        for row, number in enumerate(new):
            if number in tools.samples.own:
                table[row] = _of_sample(tools, number, gradient, basis)
        return table

    table = tools.together(own_part, tools.numbers(*shape), after=operator)
    curvature = tools.numbers(0, 0) if subspace is None else subspace.curvature.to(table)
    own = table[:-1, 2 + dimension :].reshape(len(new), dimension, dimension)
    model = QuadraticIncrement(
        increment(table[:-1, 0], table[-1, 0], k),
        increment(table[:-1, 2 : 2 + dimension], tools.space.dots([basis], gradient), k),
        increment(0.5 * (own + own.mT), curvature, k),
    )
    return model, table[:-1, 1] / (k + 1) ** 2


def _of_sample(tools: GrowthTools, number: int, mean_gradient: Tensor, basis: Tensor) -> Tensor:
    loss, gradients = tools.gradients(number, graph=bool(len(basis)))
    own, rows = tools.space.pack(gradients), []
    for vectors in basis.split(tools.at_once) if len(basis) else ():
        with building_graphs():
            products = products_with(gradients, tools.parameters, tools.space, vectors)
        rows.append(pairwise_dots(products, basis).reshape(-1))
        tools.on_product()
    square = tools.space.squared_norm(own - mean_gradient)
    return torch.cat([loss.detach().double().reshape(1), square, tools.space.dots([basis], own), *rows])
