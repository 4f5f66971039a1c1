"""Searches that begin where another eigenvalue has grown past the one followed, and matrices of extreme size."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_curvature.linalg import Eigenpairs, VectorSpace, eigenpairs

N, OLD, NEW = 20_000, 10.0, 12.0
SEEDS = range(40)
# 5 % of the searches, and three standard deviations of 1.4.
MISSES = 2 + 4


def warm_search(
    seed: int, old: list[float], new: float, dtype: torch.dtype = torch.float32, **asked: Any
) -> Eigenpairs:
    """From the eigenvectors of the old eigenvalues, where another has the new one by now."""
    generator = torch.Generator().manual_seed(seed)
    diagonal = (torch.rand(N, generator=generator) - 0.2).to(dtype)
    diagonal[: len(old)], diagonal[-1] = torch.tensor(old).to(dtype), new
    space = VectorSpace([diagonal])
    start = torch.eye(len(old), N, dtype=dtype)
    return eigenpairs(
        lambda v: diagonal * v, space, **({"max_matvecs": 100, "start": start, "generator": generator} | asked)
    )


def by_residual_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    # The module has the name of the function that its package exports.
    monkeypatch.setattr(sys.modules[eigenpairs.__module__], "_OVERLOOKED", 1e9)


@pytest.mark.parametrize("max_basis", [64, 5], ids=["one basis", "restarts"])
def test_the_eigenvalue_that_overtook_is_found(max_basis: int) -> None:
    """It is larger by 20 %, so that 5 % of the searches may miss it, and ``upper`` is below it where they do."""
    searches = [warm_search(seed, [OLD], NEW, largest=1, max_basis=max_basis) for seed in SEEDS]
    missed = [pairs for pairs in searches if abs(float(pairs.values) - OLD) < 0.1]
    assert len(missed) <= MISSES
    for pairs in searches:
        assert pairs.converged == (True,)
        assert float(pairs.values) <= pairs.upper <= 1.101 * float(pairs.values)
        if not any(pairs is other for other in missed):
            # Products and dot products in float32: some roundings of 6e-8 of 12.
            assert float(pairs.errors) <= 1e-3 * NEW
            assert abs(float(pairs.values) - NEW) <= float(pairs.errors) + 1e-5


def test_small_residuals_alone_would_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """The old eigenvalue is returned from most seeds; ``upper`` says that it may be the wrong one."""
    by_residual_alone(monkeypatch)
    searches = [warm_search(seed, [OLD], NEW, largest=1) for seed in SEEDS]
    missed = [pairs for pairs in searches if abs(float(pairs.values) - OLD) < 0.1]
    assert len(missed) >= 30
    assert all(pairs.converged == (True,) for pairs in missed)
    assert sum(pairs.upper < NEW for pairs in missed) <= MISSES


@pytest.mark.parametrize(
    ("old", "new", "asked"),
    [
        ([10.0, 5.0], 6.0, {"largest": 2}),
        ([10.0, 9.0], 12.0, {"largest": 2}),
        ([10.0, 8.0, 5.0], 6.0, {"largest": 3}),
        ([10.0, -5.0], -6.0, {"largest": 1, "smallest": 1}),
        ([-10.0], 12.0, {"magnitude": 1}),
        ([-10.0, 5.0], 6.0, {"magnitude": 2}),
        ([-10.0, 5.0], -6.0, {"magnitude": 2}),
    ],
    ids=str,
)
@pytest.mark.thinned(5)
def test_one_of_several_overtaken(
    old: list[float], new: float, asked: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missed() -> int:
        return sum(not (warm_search(seed, old, new, **asked).values - new).abs().lt(0.1).any() for seed in SEEDS)

    guarded = missed()
    assert guarded <= MISSES
    by_residual_alone(monkeypatch)
    # Least, 4 or more, where the new one is at the end that products show first.
    assert missed() >= guarded + 3


class Told:
    """Bounds as they are given, by place."""

    def __init__(self, above: list[float], below: list[float]) -> None:
        self.above, self.below = above.__getitem__, below.__getitem__


@pytest.mark.parametrize(
    ("largest", "smallest", "magnitude", "expected"),
    [
        (2, 0, 0, [9.5 - 9.0, 4.0 - 3.0]),
        (0, 2, 0, [12.0 - 10.0, 6.0 - 5.0]),
        (1, 1, 0, [0.5, 2.0]),
        # −10, 9, −5, 3: beside those before it, −12 and 9.5 may be there, −6 and 9.5, −6 and 4, −5.5 and 4.
        (0, 0, 4, [12.0 - 10.0, 9.5 - 9.0, 6.0 - 5.0, 5.5 - 3.0]),
        (1, 0, 1, [0.5, 2.0]),
    ],
)
def test_what_may_stand_in_the_place_of_each(
    largest: int, smallest: int, magnitude: int, expected: list[float]
) -> None:
    module: Any = sys.modules[eigenpairs.__module__]
    values = torch.tensor([9.0, 3.0, 0.0, -5.0, -10.0], dtype=torch.float64)
    wanted = module._Wanted(largest, smallest, magnitude)
    bounds = Told([9.5, 4.0, 1.0], [-12.0, -6.0, -5.5])
    assert wanted.overlooked(bounds, values[wanted.choose(values)]).tolist() == pytest.approx(expected)


def test_cut_off_before_another_is_excluded() -> None:
    """A small residual, and not converged."""
    pairs = warm_search(0, [OLD], NEW, largest=1, max_matvecs=3)
    # Drawn towards the other by the square of its part, 0.3/√N.
    assert float(pairs.values) == pytest.approx(OLD, rel=1e-4)
    assert float(pairs.residuals) < 1e-3 * OLD
    assert pairs.converged == (False,)
    assert pairs.upper > NEW


@pytest.mark.parametrize("size", [2, 3, 5, 10])
@pytest.mark.parametrize("seed", range(5))
def test_few_dimensions(size: int, seed: int) -> None:
    diagonal = torch.linspace(-1.0, 1.0, size, dtype=torch.float64)
    space = VectorSpace([diagonal])
    generator = torch.Generator().manual_seed(seed)
    # From the eigenvector of the smallest.
    pairs = eigenpairs(
        lambda v: diagonal * v, space, largest=1, start=[torch.eye(size).double()[0]], generator=generator
    )
    assert pairs.converged == (True,)
    # A residual of 1e-3, and the next 0.2 away.
    assert float(pairs.values) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("top", [0.0, 1e-3, -1.0])
def test_a_largest_that_is_small_beside_the_smallest(top: float, warm: bool, dtype: torch.dtype) -> None:
    """No share of the largest can be told where rounding is larger: the search ends nevertheless."""
    generator = torch.Generator().manual_seed(0)
    diagonal = -1000.0 + 500.0 * torch.rand(N, generator=generator, dtype=torch.float64)
    diagonal[0] = top
    diagonal = diagonal.to(dtype)
    start = torch.eye(1, N, dtype=dtype) if warm else ()
    pairs = eigenpairs(lambda v: diagonal * v, VectorSpace([diagonal]), largest=1, start=start, max_matvecs=60)
    assert pairs.converged == (True,)
    # The residual of 1e-3 or of 16 roundings of 1000, squared over the gap of 500, and roundings of 1000.
    assert abs(float(pairs.values) - top) <= 1e-5 + 16.0 * torch.finfo(dtype).eps * 1000.0


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
    assert (pairs.errors <= 1e-3 * pairs.values.abs()).all()
    # And some roundings of 6e-8 of 10.
    off = (pairs.values / scale - torch.tensor([10.0, -5.0], dtype=torch.float64)).abs()
    assert (off <= pairs.errors / scale + 1e-5).all()
    assert (pairs.errors / scale > 0.0).all()  # none of them was lost below the least number


@pytest.mark.parametrize("dimension", [26, 91, 128])
@pytest.mark.parametrize("warm", [False, True])
def test_the_second_is_not_taken_for_the_first_in_few_dimensions(dimension: int, warm: bool) -> None:
    """As a graph attention network of 91 parameters has them: the second eigenvalue is 4 % below the first."""
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        diagonal = 0.93 * torch.rand(dimension, generator=g, dtype=torch.float64) ** 4
        diagonal[0], diagonal[1] = 1.0, 0.96
        start = [torch.eye(dimension, dtype=torch.float64)[1]] if warm else []
        space = VectorSpace([diagonal])
        found = eigenpairs(lambda v, d=diagonal: d * v, space, largest=1, start=start, generator=g)
        assert abs(float(found.values) - 1.0) <= float(found.errors) <= 1e-3
        assert found.converged == (True,)
