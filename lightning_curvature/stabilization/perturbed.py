"""Losses with the parameters moved, and traces of the increment's Hessian in the full space."""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_curvature.functional import increment
from lightning_curvature.linalg.space import Distribution
from lightning_curvature.operators.graphs import products_with
from lightning_curvature.operators.micro_batches import building_graphs
from lightning_curvature.stabilization.problem import GrowthTools

# What random vectors are for.
_PROBES, _TRACES = 2, 3
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
    return increment(table[:, 1:], table[:, :1], k), rounding_of(tools, table, k)


def rounding_of(tools: GrowthTools, losses: Tensor, k: int) -> float:
    """How large an increment the rounding of losses alone may make."""
    return _ROUNDING * torch.finfo(tools.space.dtype).eps * float(losses.abs().max()) / (k + 1)


def losses_around(tools: GrowthTools, count: int, sigma: float) -> Tensor:
    """Return the losses of all samples at w + ε, ε ~ N(0, σ²I_N): one pass serves every k.

    Returns:
        (count, samples) float64; the directions of ε are the same at every σ.
    """
    total = tools.samples.total
    own, generator = tools.samples.among(range(total)), tools.generator(_PROBES)
    moves: Iterable[Tensor] = (tools.space.random(generator).mul_(sigma) for _ in range(count))

    def own_part() -> Tensor:
        table = tools.numbers(count, total)
        for row in tools.moved(moves):
            table[row, own] = tools.losses.each(own).double()
        return table

    return tools.together(own_part, tools.numbers(count, total))


@dataclass(frozen=True)
class DirectionalTerms:
    r"""What the quadratic model of the full space is along random directions v.

    Attributes:
        slopes: cᵀv with c = ∇L_{k+1} − ∇L_k, (vectors, candidates) float64.
        forms: vᵀAv with A = ∇²L_{k+1} − ∇²L_k.
        lengths: ‖Av‖².
    """

    slopes: Tensor
    forms: Tensor
    lengths: Tensor

    def at(self, a: Tensor, sigma: float) -> Tensor:
        """The model at w + σv, (vectors, candidates)."""
        return a + sigma * self.slopes + 0.5 * sigma**2 * self.forms


def trace_terms(tools: GrowthTools) -> dict[int, DirectionalTerms]:
    """Return terms along vectors of random signs, by k: for traces."""
    return _terms_along(tools, tools.options.trace_vectors, _TRACES, "rademacher")


def probe_terms(tools: GrowthTools, count: int) -> dict[int, DirectionalTerms]:
    """Return terms along the directions of the first probes of :func:`losses_around`, by k."""
    return _terms_along(tools, count, _PROBES, "normal")


def _terms_along(tools: GrowthTools, left: int, use: int, distribution: Distribution) -> dict[int, DirectionalTerms]:
    """Sums over the first k samples are those before and the samples since: each takes part once in a vector."""
    space, sizes, generator = tools.space, tools.options.sample_sizes, tools.generator(use)
    found: dict[int, list[Tensor]] = {k: [] for k in sizes}
    while left:
        count = min(left, tools.at_once)
        left -= count
        vectors = torch.stack([space.random(generator, distribution) for _ in range(count)])
        # In the last row the gradient.
        running = space.zeros(count + 1)
        for before, k in zip((0, *sizes), sizes, strict=False):
            running += _summed(tools, range(before, k), vectors)
            found[k].append(_terms(tools, k, vectors, running / k))
    return {k: DirectionalTerms(*torch.cat(parts).unbind(-1)) for k, parts in found.items()}


def _summed(tools: GrowthTools, numbers: range, vectors: Tensor) -> Tensor:
    """Products of vectors with the sum of the Hessians of samples, and that of their gradients; one collective."""

    def own_part() -> Tensor:
        with contextlib.closing(tools.operator(numbers, 1)) as operator:
            rows = []
            for vector in vectors:
                rows.append(operator.local_product(vector))
                tools.on_product()
            return torch.stack([*rows, operator.local_gradient()])

    return tools.together(own_part, tools.space.zeros(len(vectors) + 1))


def _terms(tools: GrowthTools, k: int, vectors: Tensor, means: Tensor) -> Tensor:
    """(vectors, candidates, 3)."""
    new, space = tools.new(k), tools.space

    def own_part() -> Tensor:
        table = tools.numbers(len(vectors), len(new), 3)
        for column, number in enumerate(new):
            if number in tools.samples.own:
                _, gradients = tools.gradients(number, graph=True)
                with building_graphs():
                    products = products_with(gradients, tools.parameters, space, vectors)
                change = increment(space.pack(gradients), means[-1], k)
                table[:, column, 0] = space.dots([vectors], change)
                for row, product in enumerate(increment(products, means[:-1], k)):
                    table[row, column, 1] = space.dot(vectors[row], product)
                    table[row, column, 2] = space.squared_norm(product)[0]
        return table

    return tools.together(own_part, tools.numbers(len(vectors), len(new), 3))
