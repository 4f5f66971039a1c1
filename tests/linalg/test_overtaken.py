"""Searches that begin where another eigenvalue has grown past the one followed, and matrices of extreme size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_curvature.linalg import Eigenpairs, VectorSpace, eigenpairs

N, OLD, NEW = 20_000, 10.0, 11.0
SEEDS = range(10)


def warm_search(seed: int, least: int) -> Eigenpairs:
    """From the eigenvector of 10 with 0.3 of a random one, where another has an eigenvalue of 11 by now."""
    generator = torch.Generator().manual_seed(seed)
    diagonal = torch.rand(N, generator=generator) - 0.2
    diagonal[0], diagonal[1] = OLD, NEW
    space = VectorSpace([diagonal])
    start, noise = space.zeros(), space.random(generator)
    start[0] = 1.0
    start.add_(noise, alpha=0.3 / space.norm(noise))
    return eigenpairs(
        lambda v: diagonal * v,
        space,
        largest=1,
        tolerance=1e-3,
        min_matvecs=least,
        max_matvecs=100,
        start=[start],
        generator=generator,
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_the_eigenvalue_that_overtook_is_found(seed: int) -> None:
    pairs = warm_search(seed, least=8)
    assert pairs.matvecs >= 8
    assert pairs.converged == (True,)
    # The distance to the next eigenvalue is 1: a residual r leaves an error below r²/(1 - r).
    residual = float(pairs.residuals)
    assert residual <= 1e-3 * NEW
    # Products and dot products in float32: some roundings of 6e-8 of 11.
    assert abs(float(pairs.values) - NEW) <= residual**2 / (1.0 - residual) + 1e-5


def test_small_residuals_alone_would_not_do() -> None:
    """Without a least number of products the old eigenvalue is returned, as converged, from most seeds."""
    found = [warm_search(seed, least=1) for seed in SEEDS]
    missed = [pairs for pairs in found if abs(float(pairs.values) - OLD) < 0.1]
    assert len(missed) >= 5
    assert all(pairs.converged == (True,) and pairs.matvecs < 8 for pairs in missed)


@pytest.mark.parametrize("size", [1e-30, 1e25])
def test_norm_of_numbers_whose_squares_leave_the_range(size: float) -> None:
    space = VectorSpace([torch.zeros(30, 10), torch.zeros(100)])
    vector = torch.full((400,), size)
    # Four hundred equal squares are summed in float64; the number itself is rounded to float32.
    assert space.norm(vector) == pytest.approx(20.0 * float(vector[0]), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-24, 1.0, 1e18])
def test_eigenvalues_scale_with_the_matrix(scale: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.rand(2000, generator=generator, dtype=torch.float64) - 0.2
    numbers[0], numbers[1] = 10.0, -5.0
    diagonal: Tensor = (numbers * scale).to(dtype)
    space = VectorSpace([diagonal])
    pairs = eigenpairs(lambda v: diagonal * v, space, largest=1, smallest=1)
    assert pairs.converged == (True, True)
    # A residual of 1e-3 of an eigenvalue, and the others half as far as it is large or more: 2e-6.
    assert (pairs.values / scale).tolist() == pytest.approx([10.0, -5.0], rel=1e-5)
    assert (pairs.residuals <= 1e-3 * pairs.values.abs()).all()
    assert (pairs.errors / scale > 0.0).all()  # none of them was lost below the least number
