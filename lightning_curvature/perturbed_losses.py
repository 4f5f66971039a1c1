"""Losses with the parameters moved, and traces of the increment's Hessian in the full space."""

import contextlib
from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_curvature.functional import increment
from lightning_curvature.operators.micro_batches import building_graphs
from lightning_curvature.probing import products_with
from lightning_curvature.stabilization_tools import GrowthTools

# Losses of equal samples differ by a few roundings, by how they were batched.
_ROUNDING = 8.0


def increments_in(tools: GrowthTools, k: int, basis: Tensor, probes: Tensor) -> tuple[Tensor, float]:
    """Return the true increments at w + Uz.

    Args:
        tools: of the measurement.
        k: samples before the new one.
        basis: U as rows, (D, n).
        probes: z, (S, D).

    Returns:
        (S, candidates) float64, and how large an increment rounding alone may make.
    """
    new = tools.new(k)
    own = tools.samples.among(new)
    moves = (z.to(basis.dtype) @ basis for z in probes)

    def own_part() -> Tensor:
        table = tools.numbers(len(probes), 1 + len(new))
        for row in tools.moved(moves):
            table[row, 0] = tools.mean_loss(k)
            if own:
                table[row, [1 + number - k for number in own]] = tools.losses.each(own).double()
        return table

    table = tools.together(own_part, tools.numbers(len(probes), 1 + len(new)))
    rounding = _ROUNDING * torch.finfo(tools.space.dtype).eps * float(table.abs().max()) / (k + 1)
    return increment(table[:, 1:], table[:, :1], k), rounding


def losses_around(tools: GrowthTools, sigma: float) -> Tensor:
    """Return the losses of all samples at w + ε, ε ~ N(0, σ²I_N): one pass serves every k.

    Returns:
        (S, samples) float64.
    """
    count, total = tools.options.draws, tools.samples.total
    own, generator = tools.samples.among(range(total)), tools.generator(2)
    moves: Iterable[Tensor] = (tools.space.random(generator).mul_(sigma) for _ in range(count))

    def own_part() -> Tensor:
        table = tools.numbers(count, total)
        for row in tools.moved(moves):
            table[row, own] = tools.losses.each(own).double()
        return table

    return tools.together(own_part, tools.numbers(count, total))


def trace_samples(tools: GrowthTools) -> dict[int, tuple[Tensor, Tensor]]:
    r"""Return vᵀAv and ‖Av‖² for random signs v and :math:`A = (\nabla^2\ell - \nabla^2 L_k)/(k+1)`, at each k.

    Products with the sum over the first k samples are those with the sum before and the samples since.

    Returns:
        By k, (vectors, candidates) float64 each.
    """
    space, sizes, generator = tools.space, tools.options.sample_sizes, tools.generator(3)
    found: dict[int, list[Tensor]] = {k: [] for k in sizes}
    left = tools.options.trace_vectors
    while left:
        count = min(left, tools.at_once)
        left -= count
        vectors = torch.stack([space.random(generator, "rademacher") for _ in range(count)])
        running = torch.zeros_like(vectors)
        for before, k in zip((0, *sizes), sizes, strict=False):
            running += _summed_products(tools, range(before, k), vectors)
            found[k].append(_terms(tools, k, vectors, running / k))
    return {
        k: (torch.cat([t[..., 0] for t in parts]), torch.cat([t[..., 1] for t in parts])) for k, parts in found.items()
    }


def _summed_products(tools: GrowthTools, numbers: range, vectors: Tensor) -> Tensor:
    """Products of vectors with the sum of the Hessians of samples, (vectors, n); one collective for all of them."""

    def own_part() -> Tensor:
        with contextlib.closing(tools.operator(numbers, 1)) as operator:
            rows = []
            for vector in vectors:
                rows.append(operator.local_product(vector))
                tools.on_product()
        return torch.stack(rows)

    return tools.together(own_part, torch.zeros_like(vectors))


def _terms(tools: GrowthTools, k: int, vectors: Tensor, means: Tensor) -> Tensor:
    """(vectors, candidates, 2)."""
    new, space = tools.new(k), tools.space

    def own_part() -> Tensor:
        table = tools.numbers(len(vectors), len(new), 2)
        for column, number in enumerate(new):
            if number in tools.samples.own:
                _, gradients = tools.gradients(number, graph=True)
                with building_graphs():
                    products = products_with(gradients, tools.parameters, space, vectors)
                for row, product in enumerate(increment(products, means, k)):
                    table[row, column, 0] = space.dot(vectors[row], product)
                    table[row, column, 1] = space.squared_norm(product)[0]
        return table

    return tools.together(own_part, tools.numbers(len(vectors), len(new), 2))
