"""Losses at perturbed parameters, and the quadratic model of the increment along directions of the full space."""

import contextlib
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_curvature.functional import increment
from lightning_curvature.linalg.space import Distribution
from lightning_curvature.stabilization.problem import StabilizationProblem

# Random vectors: the use of random numbers, and their distribution.
_USES: dict[str, tuple[int, Distribution]] = {"draws": (2, "normal"), "signs": (3, "rademacher")}
# Losses of equal samples differ by a few roundings, by how they were batched.
_ROUNDING = 8.0


def increments_in(problem: StabilizationProblem, k: int, basis: Tensor, draws: Tensor) -> tuple[Tensor, float]:
    """Return the true increments at w + Uz, (S, candidates) float64, and the largest that rounding alone may make.

    U has the rows of ``basis``, (D, n), and z those of ``draws``, (S, D).
    """
    new = problem.new(k)
    held = problem.losses.samples.among(new)

    def fill(table: Tensor) -> None:
        for row in problem.moved(z.to(basis.dtype) @ basis for z in draws):
            table[row, 0] = problem.mean_loss(k)
            if held:
                table[row, [1 + number - k for number in held]] = problem.losses.each(held).double()

    table = problem.together(problem.zeros(len(draws), 1 + len(new)), fill)
    return increment(table[:, 1:], table[:, :1], k), rounding_of(problem, table, k)


def rounding_of(problem: StabilizationProblem, losses: Tensor, k: int) -> float:
    """Return the largest increment that the rounding of losses alone may make."""
    return _ROUNDING * torch.finfo(problem.space.dtype).eps * float(losses.abs().max()) / (k + 1)


def losses_around(problem: StabilizationProblem, count: int, sigma: float) -> Tensor:
    """Return the losses of all samples at w + ε, ε ~ N(0, σ²I_N), (count, samples) float64: they serve every k.

    The directions of ε are the same at every σ.
    """
    total, generator = problem.losses.samples.total, problem.generator(_USES["draws"][0])
    held = problem.losses.samples.among(range(total))

    def fill(table: Tensor) -> None:
        for row in problem.moved(problem.space.random(generator).mul_(sigma) for _ in range(count)):
            table[row, held] = problem.losses.each(held).double()

    return problem.together(problem.zeros(count, total), fill)


@dataclass(frozen=True)
class DirectionalTerms:
    r"""Terms of the quadratic model of the full space along random directions v.

    Attributes:
        slopes: cᵀv with c = ∇L_{k+1} − ∇L_k, (vectors, candidates) float64.
        forms: vᵀAv with A = ∇²L_{k+1} − ∇²L_k.
        lengths: ‖Av‖².
    """

    slopes: Tensor
    forms: Tensor
    lengths: Tensor

    def at(self, a: Tensor, sigma: float) -> Tensor:
        """Return the model at w + σv, (vectors, candidates)."""
        return a + sigma * self.slopes + 0.5 * sigma**2 * self.forms


def terms_along(
    problem: StabilizationProblem, left: int, vectors_are: Literal["draws", "signs"]
) -> dict[int, DirectionalTerms]:
    """Return terms by k, along the directions of the first draws of :func:`losses_around` or along random signs.

    Sums over the first k samples go on from those over the k before: a vector is multiplied with each sample once.
    """
    use, distribution = _USES[vectors_are]
    space, sizes, generator = problem.space, problem.options.sample_sizes, problem.generator(use)
    terms: dict[int, list[Tensor]] = {k: [] for k in sizes}
    while left:
        count = min(left, problem.vectors_at_once)
        left -= count
        vectors = torch.stack([space.random(generator, distribution) for _ in range(count)])
        # In the last row the gradient.
        running = space.zeros(count + 1)
        for before, k in zip((0, *sizes), sizes, strict=False):
            running += _summed(problem, range(before, k), vectors)
            terms[k].append(_terms(problem, k, vectors, running / k))
    return {k: DirectionalTerms(*torch.cat(blocks).unbind(-1)) for k, blocks in terms.items()}


def _summed(problem: StabilizationProblem, numbers: range, vectors: Tensor) -> Tensor:
    """Return the products of vectors with the sum of the samples' Hessians, and the sum of their gradients."""

    def fill(rows: Tensor) -> None:
        with contextlib.closing(problem.operator(numbers, 1)) as operator:
            for row, vector in zip(rows, vectors, strict=False):
                row.copy_(operator.local_product(vector))
                problem.on_product()
            rows[-1] = operator.local_gradient()

    return problem.together(problem.space.zeros(len(vectors) + 1), fill)


def _terms(problem: StabilizationProblem, k: int, vectors: Tensor, means: Tensor) -> Tensor:
    """Return slopes, forms and lengths, (vectors, candidates, 3)."""
    new, space = problem.new(k), problem.space

    def fill(table: Tensor) -> None:
        for number in problem.losses.samples.among(new):
            with problem.sample(number) as (operator, gradient, _):
                products = operator.local_products(vectors)
            of_sample = table[:, number - k]
            of_sample[:, 0] = space.dots([vectors], increment(gradient, means[-1], k))
            for row, product in enumerate(increment(products, means[:-1], k)):
                of_sample[row, 1] = space.dot(vectors[row], product)
                of_sample[row, 2] = space.squared_norm(product)[0]

    return problem.together(problem.zeros(len(vectors), len(new), 3), fill)
