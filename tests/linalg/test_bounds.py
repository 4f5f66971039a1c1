"""Bounds on overlooked eigenvalues: what they promise, against dense spectra in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lightning_curvature.linalg import KrylovSpace, VectorSpace, eigenpairs
from lightning_curvature.linalg.bounds import OverlookedBounds
from tests.oracles.spectra import Operator, with_bulk, with_spectrum

# In units of the size of the matrix: some roundings of float64.
ROUNDING = 1e-12


def grown(
    operator: Operator, start: list[Tensor], products: int, *, capacity: int = 1000, lower: int = 3
) -> Iterator[tuple[KrylovSpace, OverlookedBounds]]:
    """The space and its bounds after each product; a full basis is restarted from 3 upper vectors and so many lower."""
    krylov, bounds = KrylovSpace(operator, operator.space), OverlookedBounds(operator.space.dimension)
    for vector in start:
        krylov.add(vector)
    for _ in range(products):
        krylov.step()
        values, vectors, couplings = krylov.ritz()
        bounds.update(values, vectors, couplings)
        yield krylov, bounds
        if len(krylov.basis) >= capacity:
            chosen = torch.tensor([*range(3), *range(len(values) - lower, len(values))])
            krylov.restart(vectors[:, chosen], values[chosen])
            bounds.restart(len(chosen))


def randoms(operator: Operator, seed: int, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [operator.space.random(generator) for _ in range(count)]


@pytest.mark.parametrize(
    ("capacity", "lower"), [(1000, 3), (14, 3), (14, 0)], ids=["one basis", "restarts", "restarts from one end"]
)
@pytest.mark.parametrize("block", [1, 2, 5])
@pytest.mark.thinned(9)
def test_whatever_lies_beyond_has_no_part_of_the_first_vector(block: int, capacity: int, lower: int) -> None:
    """The statement behind the probability: |v·b| < δ for each eigenvector beyond. A large δ makes there be some."""
    beyond = 0
    for seed in range(8):
        operator = with_spectrum(with_bulk([3.0, 1.6, 1.3, -1.2, -1.5, -2.5], n=80, seed=seed), seed=seed)
        values, vectors = operator.eigh()
        start = randoms(operator, seed, block)
        parts = (vectors.T @ (start[0] / start[0].norm())).abs()
        for _, bounds in grown(operator, start, 30, capacity=capacity, lower=lower):
            for bounds.threshold in (0.1, 0.01, 1e-4):
                outside = (values > bounds.above(0) + ROUNDING) | (values < bounds.below(0) - ROUNDING)
                beyond += int(outside.sum())
                assert (parts[outside] < bounds.threshold).all()
    assert beyond > 20


@pytest.mark.parametrize("block", [1, 3])
def test_the_bound_is_where_the_function_crosses_the_threshold(block: int) -> None:
    operator = with_spectrum(with_bulk([3.0, 2.0, -2.0]))
    for krylov, bounds in grown(operator, randoms(operator, 0, block), 12):
        done = krylov.done
        square, couplings = krylov.projected[:done, :done], krylov.projected[done:, :done]
        top = float(torch.linalg.eigvalsh(square)[-1])

        def crossing(t: float) -> float:
            resolvent = torch.linalg.inv(t * torch.eye(done).double() - square)  # noqa: B023
            return float((couplings @ resolvent[:, 0]).norm())  # noqa: B023

        distance = bounds.above(0) - top
        assert crossing(top + distance) <= bounds.threshold * (1.0 + 1e-6)
        # The last two places of the search lie a factor of 2^(1/64) apart.
        assert crossing(top + 0.989 * distance) >= bounds.threshold * (1.0 - 1e-6)


@pytest.mark.parametrize("part", [1.0, 0.3 / 1.3], ids=["random", "random in part"])
def test_coverage_is_what_it_says(part: float) -> None:
    """One product with a matrix of one enormous eigenvalue: all the slack there is lies in the law of the start."""
    size, seeds = 200, 400
    diagonal = torch.zeros(size, dtype=torch.float64)
    diagonal[0] = 1e6
    missed = 0
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(size, dtype=torch.float64, generator=generator)
        start *= (0.3 if part < 1.0 else 1.0) / start.norm()
        start[1] += 1.0 if part < 1.0 else 0.0
        krylov = KrylovSpace(lambda v: diagonal * v, VectorSpace([diagonal]))
        krylov.add(start)
        krylov.step()
        bounds = OverlookedBounds(size, part)
        bounds.update(*krylov.ritz())
        missed += bounds.above(0) < 1e6
    # 5 % of 400 with their standard deviation of 4.4 three times; √(1 + 0.3²)/1.3 of it where the start is taken to be
    # as long as it can be.
    assert 0.05 * seeds * (1.0 if part == 1.0 else 0.8) - 13.2 <= missed <= 0.05 * seeds + 13.2
    assert missed > 0


@pytest.mark.parametrize("products", [3, 5, 8])
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.thinned(6)
def test_coverage_of_searches(products: int, warm: bool) -> None:
    """Searches that are cut off, begun at random or with the second eigenvector."""
    operator = with_spectrum(with_bulk([3.0, 2.8, -2.0], n=100))
    values, vectors = operator.eigh()
    above = below = 0
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        start = [vectors[:, 1]] if warm else []
        pairs = eigenpairs(
            operator, operator.space, largest=1, smallest=1, max_matvecs=products, start=start, block_size=1,
            generator=generator,
        )  # fmt: skip
        above, below = above + (float(values[0]) > pairs.upper), below + (float(values[-1]) < pairs.lower)
    # 5 % of 200, and three standard deviations of 3.1.
    assert max(above, below) <= 19


@pytest.mark.parametrize("max_basis", [64, 8])
def test_near_at_convergence(max_basis: int) -> None:
    operator = with_spectrum(with_bulk([3.0, 2.5, -2.0], n=300))
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        pairs = eigenpairs(
            operator, operator.space, largest=1, residual_tolerance=1e-3, max_basis=max_basis, generator=generator
        )
        assert (pairs.iterations > 1) == (max_basis == 8)
        # A residual of r leaves r(u·e₁)/δ, with a part u·e₁ of the start of some 1/√N: about 16 r, r below 1e-3.
        assert 0.0 <= pairs.upper / 3.0 - 1.0 < 0.05
        assert pairs.lower < -2.0


def test_restarts_let_the_bound_shrink() -> None:
    operator = with_spectrum(with_bulk([1.3, -1.2], n=300))
    found = [bounds.above(0) for _, bounds in grown(operator, randoms(operator, 0, 1), 120, capacity=14)]
    # The first restart is after 13 products, when the bound is not near yet.
    assert found[12] > 1.01 * 1.3
    assert found[-1] == pytest.approx(1.3, rel=1e-6)
    # Nothing is lost by one: the product after it is as good as the one before it.
    assert all(after <= 1.02 * before for before, after in itertools.pairwise(found))


@pytest.mark.parametrize("scale", [1e-100, 1e-24, 1e18, 1e100])
def test_bounds_scale_with_the_matrix(scale: float) -> None:
    operator = with_spectrum(with_bulk([3.0, -2.0]))
    scaled = Operator(scale * operator.matrix)
    start = randoms(operator, 0, 2)
    pairs = zip(grown(operator, start, 30, capacity=14), grown(scaled, start, 30, capacity=14), strict=True)
    for (_, one), (_, two) in pairs:
        # Rounding may move a crossing to the next of the places where it is looked for, a factor of 2^(1/64) away.
        assert two.above(0) / scale == pytest.approx(one.above(0), rel=0.012)
        assert two.below(0) / scale == pytest.approx(one.below(0), rel=0.012)


def test_the_lower_end_is_the_upper_of_the_mirror() -> None:
    operator = with_spectrum(with_bulk([3.0, 2.0, -1.5]))
    mirrored, start = Operator(-operator.matrix), randoms(operator, 0, 2)
    pairs = zip(grown(operator, start, 30, capacity=14), grown(mirrored, start, 30, capacity=14), strict=True)
    for (_, one), (_, two) in pairs:
        # As above.
        assert two.below(0) == pytest.approx(-one.above(0), rel=0.012)
        assert two.above(0) == pytest.approx(-one.below(0), rel=0.012)


def test_an_invariant_subspace_leaves_nothing() -> None:
    operator = Operator(torch.diag(torch.tensor([4.0, 2.0, *[-1.0] * 28])))
    *_, (krylov, bounds) = grown(operator, [torch.ones(30, dtype=torch.float64)], 3)
    assert krylov.done == len(krylov.basis)  # nothing waits
    values, *_ = krylov.ritz()
    assert [bounds.above(0), bounds.above(1), bounds.below(0)] == [*values[:2].tolist(), float(values[2])]


def test_zero_matrix() -> None:
    space = VectorSpace([torch.zeros(30, dtype=torch.float64)])
    pairs = eigenpairs(torch.zeros_like, space, largest=1)
    assert (pairs.upper, pairs.lower) == (0.0, 0.0)


def test_beyond_the_first() -> None:
    """Without the first eigenvalue, which has been found: above the second, and near it once that is found."""
    operator = with_spectrum(with_bulk([5.0, 3.0, -2.0], n=200))
    for seed in range(10):
        for krylov, bounds in grown(operator, randoms(operator, seed, 1), 30):
            if krylov.done > 12:
                assert 3.0 - ROUNDING <= bounds.above(1) < 3.3
                assert math.isclose(bounds.above(0), 5.0, rel_tol=1e-6)
