"""Commutativity, alignment and rank correlation of two matrices: loops, exact means over rotations, planted cases."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.functional import spearman_corrcoef

from lightning_curvature.functional.noise import (
    commutativity_error,
    eigen_alignment,
    in_basis,
    random_commutativity_error,
    relative_commutativity_error,
    spearman_correlation,
)
from tests.oracles.noise import descending, in_coordinates
from tests.oracles.spectra import rotation

# Float64 products of small matrices, each rounding by 1e-16 of its largest entry.
ROUNDING = 1e-13


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def symmetric(size: int, seed: int) -> Tensor:
    matrix = random(size, size, seed=seed)
    return matrix + matrix.T


def haar(size: int, generator: torch.Generator) -> Tensor:
    """The orthogonal factor of a Gaussian matrix in its polar decomposition is Haar-distributed."""
    left, _, right = torch.linalg.svd(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return left @ right


def plane_rotation(size: int, i: int, j: int, angle: float) -> Tensor:
    matrix = torch.eye(size, dtype=torch.float64)
    matrix[i, i] = matrix[j, j] = math.cos(angle)
    matrix[i, j], matrix[j, i] = -math.sin(angle), math.sin(angle)
    return matrix


def rotations(size: int) -> Iterator[tuple[float, Tensor]]:
    """Weights and rotations that average polynomials of degree four in their entries exactly, in 2 or 3 dimensions.

    Euler angles: six equal steps see every frequency up to four, and what is left over is a polynomial of degree four
    in cos β. Reflections add nothing: the polynomials are even.
    """
    steps = [2.0 * math.pi * k / 6 for k in range(6)]
    if size == 2:
        yield from ((1.0 / 6.0, plane_rotation(2, 0, 1, angle)) for angle in steps)
        return
    for cosine, weight in zip(*np.polynomial.legendre.leggauss(3), strict=True):
        middle = plane_rotation(3, 0, 2, math.acos(cosine))
        for one in steps:
            for two in steps:
                yield weight / 72.0, plane_rotation(3, 0, 1, one) @ middle @ plane_rotation(3, 0, 1, two)


def test_commutativity_by_entries() -> None:
    c, h = symmetric(5, 0), symmetric(5, 1)
    total = 0.0
    for i in range(5):
        for j in range(5):
            total += sum((c[i, k] * h[k, j] - h[i, k] * c[k, j]).item() for k in range(5)) ** 2
    scale = math.sqrt(float(c.square().sum()) * float(h.square().sum()))
    assert commutativity_error(c, h) == pytest.approx(math.sqrt(total) / scale, rel=ROUNDING)
    product = math.sqrt(float((c @ h).square().sum()))
    assert relative_commutativity_error(c, h) == pytest.approx(math.sqrt(total) / product, rel=ROUNDING)
    # Neither units nor the basis matter.
    basis = rotation(5)
    assert commutativity_error(1e-9 * in_basis(c, basis), 1e5 * in_basis(h, basis)) == pytest.approx(
        commutativity_error(c, h), rel=1e-12
    )


def test_common_eigenvectors_commute_and_the_bound_is_reached() -> None:
    values, basis = random(2, 7), rotation(7)
    c, h = in_coordinates(values[0], basis), in_coordinates(values[1], basis)
    assert commutativity_error(c, h) < ROUNDING
    assert relative_commutativity_error(c, h) < ROUNDING
    # The largest commutator there is: two Pauli matrices.
    one, two = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, -1.0]])
    assert commutativity_error(one, two) == pytest.approx(math.sqrt(2.0), rel=ROUNDING)
    assert relative_commutativity_error(one, two) == pytest.approx(2.0, rel=ROUNDING)
    for error in (commutativity_error, random_commutativity_error, relative_commutativity_error):
        assert math.isnan(error(torch.zeros(2, 2), two))
        assert math.isnan(error(two, torch.zeros(2, 2)))


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_random_error_is_the_mean_over_all_rotations(size: int, seed: int) -> None:
    """Of an indefinite pair, of a positive one, and of rank one."""
    c, h = symmetric(size, seed), symmetric(size, seed + 10)
    if seed == 1:
        c, h = c @ c, h @ h
    if seed == 2:
        c = torch.outer(c[0], c[0])
    mean = sum(weight * commutativity_error(q @ c @ q.T, h) ** 2 for weight, q in rotations(size))
    # Twice a difference of terms as large as the result or a hundred times so.
    assert random_commutativity_error(c, h) == pytest.approx(math.sqrt(mean), rel=1e-11)


@pytest.mark.parametrize("size", [4, 12])
def test_random_error_against_draws(size: int) -> None:
    c = in_coordinates(torch.arange(size, 0, -1, dtype=torch.float64) ** -2.0, rotation(size))
    h, generator = symmetric(size, 3), torch.Generator().manual_seed(0)
    draws = torch.tensor(
        [commutativity_error(q @ c @ q.T, h) ** 2 for q in (haar(size, generator) for _ in range(2000))]
    )
    error = float(draws.std()) / math.sqrt(2000)
    assert error < 0.02 * draws.mean()
    assert random_commutativity_error(c, h) ** 2 == pytest.approx(float(draws.mean()), abs=4.0 * error)


def test_random_error_of_what_no_rotation_changes() -> None:
    # A difference of equal numbers of size 1: the root of a rounding of 1e-16.
    assert random_commutativity_error(2.0 * torch.eye(9), symmetric(9, 0)) < 1e-7
    assert random_commutativity_error(torch.tensor([[2.0]]), torch.tensor([[3.0]])) == 0.0


@pytest.mark.parametrize("size", [60, 240])
def test_few_spikes_come_out_as_the_documentation_says(size: int) -> None:
    """√(2/D), and √2 relative to CH; tr CHCH is smaller than tr C²H² by (M_C + M_H)/D, for M_C = 2 and M_H = 3."""
    c, h = torch.diag((torch.arange(size) < 2).double()), torch.diag((torch.arange(size) < 3).double())
    assert random_commutativity_error(c, h) == pytest.approx(math.sqrt(2.0 / size), rel=5.0 / size)
    q = haar(size, torch.Generator().manual_seed(0))
    # One draw of a matrix of rank two: its scatter about 1 − 5/(2D) is a few over D.
    assert relative_commutativity_error(q @ c @ q.T, h) == pytest.approx(math.sqrt(2.0), rel=10.0 / size)


def test_alignment_is_the_share_of_the_diagonal() -> None:
    c = symmetric(6, 0)
    diagonal = sum(c[i, i].item() ** 2 for i in range(6))
    everything = sum(c[i, j].item() ** 2 for i in range(6) for j in range(6))
    assert eigen_alignment(c) == pytest.approx(diagonal / everything, rel=ROUNDING)
    _, vectors = descending(c)
    assert eigen_alignment(in_basis(c @ c, vectors)) == pytest.approx(1.0, abs=ROUNDING)
    assert eigen_alignment(torch.tensor([[0.0, 1.0], [1.0, 0.0]])) == 0.0
    assert math.isnan(eigen_alignment(torch.zeros(2, 2)))


def rank_by_counting(values: list[float], i: int) -> float:
    return sum(v < values[i] for v in values) + 0.5 * (sum(v == values[i] for v in values) + 1)


@pytest.mark.parametrize("levels", [2, 4, 1000])
def test_spearman_with_and_without_ties(levels: int) -> None:
    g = torch.Generator().manual_seed(levels)
    a, b = (torch.randint(levels, (40,), generator=g).double() - levels / 2 for _ in range(2))
    b = b + a
    x, y = (np.array([rank_by_counting(v.tolist(), i) for i in range(40)]) for v in (a, b))
    found = spearman_correlation(a, b)
    assert found == pytest.approx(np.corrcoef(x, y)[0, 1], rel=ROUNDING)
    # It adds 1e-6 to a product of standard deviations, of 90 at least, and computes in float32.
    assert found == pytest.approx(float(spearman_corrcoef(a, b)), rel=1e-5)


def test_spearman_sees_the_order_only() -> None:
    a = random(30)
    assert spearman_correlation(a, a.exp()) == 1.0
    assert spearman_correlation(a, -(a**3)) == -1.0
    assert math.isnan(spearman_correlation(a, torch.full((30,), 0.1)))
    assert math.isnan(spearman_correlation(torch.zeros(0), torch.zeros(0)))
    assert math.isnan(spearman_correlation(a, torch.where(a > 1.0, torch.nan, a)))
    assert spearman_correlation(torch.tensor([1.0, math.inf, -math.inf]), torch.tensor([2, 3, 1])) == 1.0


@pytest.mark.parametrize("error", [commutativity_error, relative_commutativity_error, random_commutativity_error])
def test_matrices_of_two_sizes_are_refused(error: object) -> None:
    message = r"hessian must be \(D, D\) with D = 2 of covariance, got \(3, 3\): give both of the same directions"
    with pytest.raises(ValueError, match=message):
        error(torch.eye(2), torch.eye(3))  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"b must be \(N,\) with N = 2 of a, got \(3,\): give both"):
        spearman_correlation(torch.ones(2), torch.ones(3))
