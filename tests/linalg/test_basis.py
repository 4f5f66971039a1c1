"""Orthonormal rows in blocks: projections, combinations and replacements against dense algebra in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_curvature.linalg import VectorSpace
from lightning_curvature.linalg.basis import Basis

SIZE = 40
# Sums of 40 products: tens of roundings of 1e-16.
EXACT = {"rtol": 1e-13, "atol": 1e-14}


def filled(count: int, dtype: torch.dtype = torch.float64) -> tuple[Basis, Tensor]:
    """A basis of orthonormal rows, and these as a matrix."""
    space = VectorSpace([torch.zeros(SIZE, dtype=dtype)])
    generator = torch.Generator().manual_seed(0)
    rows = torch.linalg.qr(torch.randn(SIZE, count, generator=generator, dtype=torch.float64)).Q.T.to(dtype)
    basis = Basis(space)
    for row in rows:
        basis.append(row)
    return basis, rows


def vector(seed: int = 1) -> Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Within one block of rows, and over several.
@pytest.mark.parametrize("count", [0, 1, 7, 35])
def test_a_vector_is_made_orthogonal(count: int) -> None:
    basis, rows = filled(count)
    given, left = vector(), vector()
    coefficients = basis.orthogonalize(left)
    torch.testing.assert_close(coefficients, rows @ given, **EXACT)
    torch.testing.assert_close(left, given - rows.T @ (rows @ given), **EXACT)
    torch.testing.assert_close(basis.combine(coefficients) + left, given, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_is_left_of_a_vector_in_the_span_is_orthogonal_too(dtype: torch.dtype) -> None:
    """One pass leaves roundings of the vector, beside which a remainder of 1e-6 of it is not orthogonal any more."""
    basis, rows = filled(20, dtype)
    outside = vector().to(dtype) * (1e-6 if dtype == torch.float64 else 1e-3)
    given = rows.sum(0) + outside
    basis.orthogonalize(given)
    # Rounding of a few sums of the remainder itself, not of the vector that was a million times as long.
    lost = float((rows.double() @ given.double()).abs().max()) / float(given.norm())
    assert lost < 50.0 * torch.finfo(dtype).eps


def test_known_coefficients_spare_a_pass_and_give_the_same() -> None:
    basis, _ = filled(20)
    one, other = vector(), vector()
    expected = basis.orthogonalize(one)
    coefficients, last = basis.orthogonalize_known(other, expected[:12])
    torch.testing.assert_close(coefficients, expected, **EXACT)
    torch.testing.assert_close(other, one, **EXACT)
    assert float(last.abs().max()) < 1e-13
    # What was not true of the known ones shows in the last pass.
    wrong = expected[:12].clone()
    wrong[3] += 0.5
    _, last = basis.orthogonalize_known(vector(), wrong)
    assert float(last[3]) == pytest.approx(-0.5, rel=1e-12)


def test_rows_are_replaced_by_combinations_and_cut_off() -> None:
    basis, rows = filled(20)
    combinations = torch.linalg.qr(vector(2).new_tensor(range(18 * 5)).reshape(18, 5).sin()).Q
    basis.replace(combinations, tail=2)
    assert len(basis) == 7
    expected = torch.cat([combinations.T @ rows[:18], rows[18:]])
    torch.testing.assert_close(torch.stack([basis[i] for i in range(7)]), expected, **EXACT)
    basis.truncate(3)
    assert len(basis) == 3
    basis.append(rows[4].clone())
    torch.testing.assert_close(basis[3], rows[4], **EXACT)
