"""Noise covariance, the basis it is looked at in, and the power law: definitions by loops, and planted cases."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_curvature.functional.line_fit import fit_line
from lightning_curvature.functional.noise import (
    covariance_of_sums,
    curvature_basis,
    default_top,
    eigen_alignment,
    in_basis,
    noise_covariance,
    power_law,
)
from tests.oracles.noise import Samples, in_coordinates, shifted_gradients
from tests.oracles.spectra import rotation

# Products in float64 of matrices of some dozen rows: roundings of 1e-16 of the largest entry, a hundred of them.
ROUNDING = 1e-13


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spread_spectrum(size: int, decades: float = 3.0) -> Tensor:
    """Distinct positive eigenvalues, descending."""
    return 10.0 ** torch.linspace(0.0, -decades, size, dtype=torch.float64)


@pytest.mark.parametrize("batch_size", [1, 7])
def test_covariance_is_that_of_the_definition(batch_size: int) -> None:
    gradients = 3.0 + random(23, 5)
    expected = Samples(gradients, torch.empty(0)).covariance(batch_size)
    assert_close = torch.testing.assert_close
    assert_close(noise_covariance(gradients, batch_size), expected, rtol=ROUNDING, atol=ROUNDING)
    sums = (gradients.T @ gradients, gradients.sum(0), 23)
    assert_close(covariance_of_sums(*sums, batch_size), expected, rtol=ROUNDING, atol=20 * ROUNDING)


def test_covariance_is_the_scatter_of_mini_batches_drawn_with_replacement() -> None:
    """All 4² mini-batches of two of four samples, each as likely as the other."""
    gradients = random(4, 3)
    means = torch.stack([(one + two) / 2 for one in gradients for two in gradients])
    expected = torch.stack([torch.outer(m, m) for m in means - gradients.mean(0)]).mean(0)
    torch.testing.assert_close(noise_covariance(gradients, 2), expected, rtol=ROUNDING, atol=ROUNDING)


def test_covariance_keeps_the_digits_of_a_scatter_that_is_small_beside_the_mean() -> None:
    """1e-6 beside 1e3: their squares are eighteen digits apart, what is left after rounding the gradients is 1e-7."""
    scatter = random(40, 4)
    found = noise_covariance(1e3 + 1e-6 * scatter)
    torch.testing.assert_close(1e12 * found, noise_covariance(scatter), rtol=1e-6, atol=1e-6)


def test_covariance_of_sums_merges() -> None:
    gradients = random(20, 4)
    parts = [gradients[:3], gradients[3:15], gradients[15:]]
    products = torch.stack([part.T @ part for part in parts]).sum(0)
    total = torch.stack([part.sum(0) for part in parts]).sum(0)
    torch.testing.assert_close(
        covariance_of_sums(products, total, 20), noise_covariance(gradients), rtol=ROUNDING, atol=ROUNDING
    )


def test_one_sample_has_no_noise_and_halves_are_counted_in_float64() -> None:
    assert noise_covariance(random(1, 3)).abs().max() == 0.0
    # In bfloat16 each of 1000 gradients of 1 would round away beyond 256.
    assert covariance_of_sums(torch.tensor([[1000.0]]), torch.zeros(1), 1000).item() == 1.0
    assert noise_covariance(torch.tensor([[1.0], [-1.0]], dtype=torch.bfloat16).repeat(500, 1)).item() == 1.0


@pytest.mark.parametrize("top", [1, 4, 9])
def test_basis_holds_the_largest_eigenvalues_in_order(top: int) -> None:
    """Algebraically: −5 is the largest in size and comes last."""
    values = torch.tensor([3.0, 2.0, 1.5, 1.0, 0.5, 0.1, -0.1, -0.2, -5.0], dtype=torch.float64)
    basis = rotation(9)
    found = curvature_basis(in_coordinates(values, basis), top)
    torch.testing.assert_close(found.values, values[:top], rtol=ROUNDING, atol=ROUNDING)
    # Eigenvectors up to their sign; gaps of 0.1 at least.
    torch.testing.assert_close(
        (found.vectors @ basis[:top].T).abs(), torch.eye(top, dtype=torch.float64), rtol=1e-12, atol=1e-12
    )


def test_basis_of_a_default_size() -> None:
    assert [default_top(size) for size in (1, 2, 3, 7, 8, 50, 2500, 2560)] == [1, 2, 3, 3, 4, 20, 1000, 1024]
    assert len(curvature_basis(torch.eye(50)).values) == 20


def test_in_basis_is_a_change_of_coordinates() -> None:
    matrix, basis = random(6, 6), rotation(6)[:4]
    found = in_basis(matrix, basis)
    for i in range(4):
        for j in range(4):
            assert found[i, j].item() == pytest.approx((basis[i] @ matrix @ basis[j]).item(), abs=ROUNDING)
    assert in_basis(matrix, basis.float()).dtype == torch.float64


def test_random_shifts_give_two_exactly() -> None:
    """Zhang, Yang and Tu (2026), eqs. 96–103: C = σ²H², of gradients whose shifts have the covariance σ²I."""
    values, basis, sigma = spread_spectrum(20), rotation(20), 0.3
    hessian = in_coordinates(values, basis)
    covariance = noise_covariance(shifted_gradients(hessian, sigma))
    torch.testing.assert_close(covariance, sigma**2 * hessian @ hessian, rtol=1e-12, atol=ROUNDING)
    found = curvature_basis(hessian, 20)
    along = in_basis(covariance, found.vectors)
    law = power_law(found.values, along.diagonal())
    # The smallest C_ii is 1e-6 of the largest, and so has ten digits left: log C to 1e-10 over 7 units of log H.
    assert law.exponent == pytest.approx(2.0, abs=1e-9)
    assert law.log_factor == pytest.approx(2.0 * math.log(sigma), abs=1e-9)
    assert law.standard_error < 1e-9
    assert eigen_alignment(along) == pytest.approx(1.0, abs=ROUNDING)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.37])
def test_power_of_the_hessian_gives_its_exponent(exponent: float) -> None:
    """C = 5 H^γ in a common basis; 1 is the Fisher approximation."""
    values, basis = spread_spectrum(15, decades=2.0), rotation(15)
    covariance = 5.0 * in_coordinates(values**exponent, basis)
    found = curvature_basis(in_coordinates(values, basis), 15)
    law = power_law(found.values, in_basis(covariance, found.vectors).diagonal())
    assert law.exponent == pytest.approx(exponent, abs=1e-11)
    assert law.log_factor == pytest.approx(math.log(5.0), abs=1e-11)
    assert (law.points, law.highest) == (15, pytest.approx(1.0))
    assert law.lowest == pytest.approx(0.01)


def test_power_law_fits_positive_entries_above_the_floor_only() -> None:
    x = torch.tensor([8.0, 4.0, 2.0, 1.0, 1e-9, -1.0, 0.0, 3.0, 5.0, math.nan, math.inf, 6.0, 7.0])
    y = torch.tensor([8.0, 4.0, 2.0, 1.0, 1e9, 1.0, 1.0, 0.0, -5.0, 1.0, 1.0, math.nan, math.inf])
    law = power_law(x, y, floor=1e-8)
    assert law.exponent == pytest.approx(1.0, abs=ROUNDING)
    assert (law.points, law.lowest, law.highest) == (4, 1.0, 8.0)
    assert power_law(x, y).points == 5
    # On the floor is not above it; a negative one lets nothing negative in.
    assert power_law(x, y, floor=1.0).points == 3
    assert power_law(x, y, floor=-2.0).points == 5


def test_standard_error_of_the_exponent_is_the_scatter_of_many_fits() -> None:
    x = torch.linspace(-3.0, 0.0, 25, dtype=torch.float64).exp()
    fits = [power_law(x, (1.4 * x.log() + 0.2 * random(25, seed=seed)).exp()) for seed in range(400)]
    scatter = torch.tensor([fit.exponent for fit in fits]).std().item()
    typical = math.sqrt(sum(fit.standard_error**2 for fit in fits) / 400)
    # A standard deviation of 400 draws is known to 1/√800 = 3.5 %; four of those.
    assert typical == pytest.approx(scatter, rel=0.14)
    assert sum(fit.exponent for fit in fits) / 400 == pytest.approx(1.4, abs=4 * scatter / 20)


@pytest.mark.parametrize("value", [0.1, 0.3, 0.7, 2.3])
@pytest.mark.parametrize("count", [3, 5, 11])
def test_equal_abscissas_have_no_slope(value: float, count: int) -> None:
    """Also where their mean rounds to another number than they are."""
    x = torch.full((count,), value, dtype=torch.float64)
    assert all(map(math.isnan, fit_line(x, random(count))))
    with pytest.raises(ValueError, match=rf"curvatures must differ for a power law, got {count} times {value}"):
        power_law(x, x.square() + random(count).abs())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: noise_covariance(torch.ones(3)), r"gradients must be \(n, D\) with n ≥ 1, got \(3,\): give one row"),
        (lambda: noise_covariance(torch.ones(0, 3)), r"gradients must be \(n, D\) with n ≥ 1, got \(0, 3\): give"),
        (
            lambda: noise_covariance(torch.ones(2, 3), 0),
            "batch_size must be a whole number of at least 1, got 0: 1 is a single",
        ),
        (
            lambda: covariance_of_sums(torch.eye(1), torch.ones(1), 0),
            "samples must be a whole number of at least 1, got 0: 1 is a",
        ),
        (lambda: curvature_basis(torch.ones(2, 3)), r"hessian must be \(D, D\), got \(2, 3\): give a square matrix"),
        (lambda: curvature_basis(torch.eye(3), 4), "top must be between 1 and D = 3, got 4: 40 % of the directions"),
        (lambda: curvature_basis(torch.eye(3), 0), "top must be between 1 and D = 3, got 0: 40 % of the directions"),
        (
            lambda: power_law(torch.ones(4), torch.tensor([1.0, 1.0, 0.0, -1.0])),
            "must both be positive in at least 3 directions for a power law, got 2 of 4: measure on more samples",
        ),
        (
            lambda: power_law(torch.ones(4), torch.ones(3)),
            r"variances must be \(N,\) with N = 4 of curvatures, got \(3,\): give both of the same directions",
        ),
    ],
)
def test_bad_input(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
