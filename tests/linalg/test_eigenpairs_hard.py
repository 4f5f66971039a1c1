"""Eigenpairs where something is in the way: tiny, degenerate, noisy, not converged, not finite, wrong arguments."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_curvature.linalg import NonFiniteProductError, VectorSpace, eigenpairs
from tests.oracles.spectra import Operator, with_bulk, with_spectrum

# As in test_eigenpairs.py.
ROUNDING = 1e-12


@pytest.mark.parametrize(
    "asked", [{"largest": 2}, {"smallest": 2}, {"magnitude": 2}, {"largest": 1, "smallest": 1}], ids=str
)
def test_zero_operator(asked: dict[str, int]) -> None:
    space = VectorSpace([torch.zeros(30, dtype=torch.float64)])
    pairs = eigenpairs(torch.zeros_like, space, **asked)
    assert pairs.values.tolist() == [0.0, 0.0]
    assert pairs.residuals.tolist() == [0.0, 0.0]
    assert pairs.converged == (True, True)
    assert pairs.matvecs == 2


@pytest.mark.parametrize("factor", [1.0, -2.5])
@pytest.mark.parametrize("block_size", [None, 1])
def test_multiple_of_the_identity(factor: float, block_size: int | None) -> None:
    space = VectorSpace([torch.zeros(30, dtype=torch.float64)])
    # The factor 1 returns what it was given.
    pairs = eigenpairs(lambda v: v if factor == 1.0 else factor * v, space, largest=3, block_size=block_size)
    assert pairs.values.tolist() == pytest.approx([factor] * 3, rel=1e-14)
    assert pairs.matvecs == 3


@pytest.mark.parametrize("n", [2, 3, 4, 5])
@pytest.mark.parametrize("block_size", [None, 1, 10])
def test_tiny_spaces(n: int, block_size: int | None) -> None:
    values = torch.tensor([-4.0, 3.0, 3.0, -1.0, 0.5][:n], dtype=torch.float64)
    operator = with_spectrum(values)
    for k in range(1, n):
        for asked, expected in (
            ({"largest": k}, values.sort(descending=True).values[:k]),
            ({"smallest": k}, values.sort().values[:k]),
            ({"magnitude": k}, values[values.abs().argsort(descending=True, stable=True)][:k]),
        ):
            pairs = eigenpairs(operator, operator.space, block_size=block_size, tolerance=1e-9, **asked)
            assert all(pairs.converged)
            if block_size == 1 and n > 2:
                # One start vector sees one copy of the repeated value, and others after it.
                expected = values[(pairs.values[:, None] - values).abs().argmin(dim=1)]
            assert torch.allclose(pairs.values, expected, rtol=0.0, atol=1e-9), (asked, pairs.values)


@pytest.mark.parametrize("rank", [1, 3])
def test_low_rank(rank: int) -> None:
    # The chain ends after rank + 1 products; more pairs than it holds are asked for.
    operator = with_spectrum([5.0, 4.0, 3.0][:rank] + [0.0] * 47)
    pairs = eigenpairs(operator, operator.space, largest=5, block_size=1)
    assert torch.allclose(pairs.values, torch.tensor(([5.0, 4.0, 3.0][:rank] + [0.0] * 5)[:5]).double(), atol=ROUNDING)
    assert all(pairs.converged)
    assert pairs.matvecs <= rank + 6


def test_start_vectors_that_say_nothing() -> None:
    operator = with_spectrum(with_bulk([5.0]))
    ones = torch.ones(120, dtype=torch.float64)
    start = [torch.zeros_like(ones), ones, 2.0 * ones, torch.full_like(ones, math.nan)]
    pairs = eigenpairs(operator, operator.space, largest=1, start=start, tolerance=1e-6)
    assert float(pairs.values[0]) == pytest.approx(5.0, abs=1e-9)  # residual² over the gap: 25e-12 / 4
    assert max(abs(norm - 1.0) for norm in operator.norms) < ROUNDING


@pytest.mark.parametrize("max_matvecs", [2, 5, 9])
@pytest.mark.parametrize("asked", [{"largest": 2}, {"smallest": 2}, {"magnitude": 2}], ids=str)
def test_not_converged_is_said_and_the_errors_hold(max_matvecs: int, asked: dict[str, int]) -> None:
    operator = with_spectrum(with_bulk([1.1, -1.1], n=400))
    pairs = eigenpairs(operator, operator.space, max_matvecs=max_matvecs, tolerance=1e-6, **asked)
    assert not any(pairs.converged)
    assert pairs.matvecs == operator.products == max_matvecs
    values, _ = operator.eigh()
    found = zip(pairs.values, pairs.errors, pairs.quotients, pairs.residuals, pairs.vectors, strict=True)
    for value, error, theta, residual, v in found:
        assert float((operator.matrix @ v - theta * v).norm()) == pytest.approx(float(residual), rel=1e-6)
        assert float((values - value).abs().min()) <= float(error) + ROUNDING


def test_one_of_two_converged() -> None:
    operator = with_spectrum(with_bulk([20.0, 1.02], n=400))
    pairs = eigenpairs(operator, operator.space, largest=2, block_size=1, max_matvecs=12)
    assert pairs.converged == (True, False)


def _with_noise(operator: Operator, size: float) -> Any:
    generator = torch.Generator().manual_seed(7)

    def matvec(v: Tensor) -> Tensor:
        noise = torch.randn(v.shape, dtype=v.dtype, generator=generator) / len(v) ** 0.5
        return operator(v) + size * noise

    return matvec


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1e-1])
def test_noise_shows_as_asymmetry(size: float) -> None:
    operator = with_spectrum(with_bulk([5.0, -4.0]))
    pairs = eigenpairs(_with_noise(operator, size), operator.space, largest=1, smallest=1, max_matvecs=30)
    # A noise vector of that norm has components size/√120 = 0.09 size. The largest difference of two of them among the
    # pairs of up to 30 vectors lies between one and six of their standard deviations, 0.13 size.
    assert 0.13 * size < pairs.asymmetry < 0.8 * size
    truth = torch.tensor([5.0, -4.0], dtype=torch.float64)
    assert ((pairs.values - truth).abs() <= pairs.errors).all()


def test_a_matrix_that_is_not_symmetric_shows() -> None:
    operator = with_spectrum(with_bulk([5.0]))
    operator.matrix[0, 1] += 1.0
    assert eigenpairs(operator, operator.space, largest=1).asymmetry > 1e-4
    operator.matrix[1, 0] += 1.0
    assert eigenpairs(operator, operator.space, largest=1).asymmetry < ROUNDING


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [1, 4])
def test_a_product_that_is_not_finite(bad: float, at: int) -> None:
    operator = with_spectrum(with_bulk([5.0]))

    def matvec(v: Tensor) -> Tensor:
        product = operator(v)
        if operator.products == at:
            product[3] = bad
        return product

    sentence = (
        rf"^a product with the operator must be finite, got NaN or infinity in product {at}: look at the loss and its "
        r"gradient there\.$"
    )
    with pytest.raises(NonFiniteProductError, match=sentence):
        eigenpairs(matvec, operator.space, largest=1, tolerance=1e-9)
    assert operator.products == at


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            {},
            r"largest, smallest and magnitude must count at least one eigenpair, got 0, 0 and 0: give largest=1 for "
            r"the largest eigenvalue\.",
        ),
        (
            {"largest": -1, "smallest": 2},
            r"largest must be a whole number of at least 0, got -1: .*",
        ),
        (
            {"largest": 3, "magnitude": 3},
            r"the number of eigenpairs must be below the number of parameters, got 6 of 6: for all of them build the "
            r"matrix and call torch\.linalg\.eigh\.",
        ),
        (
            {"largest": 1, "tolerance": 0.0},
            r"tolerance must lie between 0 and 1, got 0\.0: 1e-3 gives an eigenvalue to 3 digits\.",
        ),
        ({"largest": 1, "tolerance": math.nan}, r"tolerance must lie between 0 and 1, got nan: .*"),
        (
            {"largest": 2, "smallest": 1, "max_matvecs": 2},
            r"max_matvecs must be at least the number of eigenpairs, got 2 for 3: allow 20 for each\.",
        ),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        eigenpairs(lambda v: 2.0 * v, VectorSpace([torch.zeros(6)]), **arguments)
