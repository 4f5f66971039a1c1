"""Coupling of eigendirections: loops, moments of Haar rotations that are known, and what theory expects of chance."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_curvature.functional.noise import (
    coupling_matrix,
    coupling_test,
    effective_spikes,
    haar_coupling,
    haar_rotated,
    in_basis,
    leading_couplings,
    mean_coupling,
    random_coupling,
)
from tests.oracles.noise import in_coordinates
from tests.oracles.spectra import rotation

# Float64 products of small matrices, each rounding by 1e-16 of its largest entry.
ROUNDING = 1e-13


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spikes(count: int, size: int) -> Tensor:
    return torch.diag((torch.arange(size) < count).double())


def test_coupling_by_entries() -> None:
    """Of an indefinite C, as approximations by the duality may be: R_ii = ±1."""
    c = random(5, 5) + random(5, 5).T
    assert bool((c.diagonal() < 0.0).any())
    found, values = coupling_matrix(c), []
    for i in range(5):
        for j in range(5):
            expected = c[i, j].item() / math.sqrt(abs(c[i, i].item() * c[j, j].item()))
            assert found[i, j].item() == pytest.approx(expected, rel=ROUNDING)
            if i != j:
                values.append(abs(expected))
    assert mean_coupling(found) == pytest.approx(sum(values) / 20, rel=ROUNDING)


def test_coupling_has_no_scale() -> None:
    c = random(5, 9)
    c, scales = c @ c.T, torch.tensor([1e-140, 1e-5, 1.0, 1e3, 1e80], dtype=torch.float64)
    torch.testing.assert_close(
        coupling_matrix(c * scales * scales[:, None]), coupling_matrix(c), rtol=ROUNDING, atol=ROUNDING
    )
    assert bool((coupling_matrix(c).abs() <= 1.0 + ROUNDING).all())


def test_directions_without_noise_are_left_out() -> None:
    c = torch.tensor([[1.0, 0.0, 0.5], [0.0, 0.0, 0.0], [0.5, 0.0, 1.0]])
    found = coupling_matrix(c)
    assert found.isnan().tolist() == [[False, True, False], [True] * 3, [False, True, False]]
    assert mean_coupling(found) == 0.5
    assert math.isnan(mean_coupling(coupling_matrix(torch.diag(torch.tensor([1.0, 0.0])))))
    assert math.isnan(mean_coupling(torch.ones(1, 1)))


def test_commuting_matrices_do_not_couple() -> None:
    basis, variances = rotation(12), torch.rand(12, dtype=torch.float64) + 0.1
    assert mean_coupling(coupling_matrix(in_basis(in_coordinates(variances, basis), basis))) < ROUNDING


def test_effective_spikes() -> None:
    assert effective_spikes(in_basis(spikes(7, 20), rotation(20))) == pytest.approx(7.0, rel=ROUNDING)
    values = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    assert effective_spikes(1e-8 * in_coordinates(values, rotation(3))) == pytest.approx(36.0 / 14.0, rel=ROUNDING)
    assert math.isnan(effective_spikes(torch.zeros(3, 3)))


def test_rotation_keeps_the_spectrum_and_takes_its_numbers_from_the_generator() -> None:
    c = in_coordinates(torch.arange(1.0, 9.0, dtype=torch.float64), rotation(8))
    found = haar_rotated(c, 8, torch.Generator().manual_seed(3))
    torch.testing.assert_close(torch.linalg.eigvalsh(found), torch.arange(1.0, 9.0, dtype=torch.float64))
    state = torch.get_rng_state()
    assert haar_rotated(c, 8, torch.Generator().manual_seed(3)).equal(found)
    assert not haar_rotated(c, 8, torch.Generator().manual_seed(4)).equal(found)
    assert torch.get_rng_state().equal(state)


@pytest.mark.parametrize("directions", [2, 6])
def test_rotation_has_the_moments_of_the_haar_measure(directions: int) -> None:
    """Of order two and four in the entries of Q; C need not be diagonal to begin with."""
    size, count, generator = 6, 4000, torch.Generator().manual_seed(0)
    c = in_coordinates(torch.tensor([4.0, 1.0, 0.5, 0.0, 0.0, -2.0], dtype=torch.float64), rotation(size))
    one, two = float(c.trace()), float(c.square().sum())
    draws = torch.stack([haar_rotated(c, directions, generator) for _ in range(count)])
    own, cross = draws[:, 1, 1], draws[:, 0, 1]
    for values, expected in (
        (own, one / size),
        (cross, 0.0),
        (own.square(), (one**2 + 2.0 * two) / (size * (size + 2))),
        (cross.square(), (size * two - one**2) / (size * (size - 1) * (size + 2))),
    ):
        error = float(values.std()) / math.sqrt(count)
        assert float(values.mean()) == pytest.approx(expected, abs=4.0 * error)
    assert haar_rotated(c, directions).shape == (directions, directions)


def test_rotation_prefers_no_sign() -> None:
    """Signs as a QR decomposition leaves them would put the last mean at nine of its standard errors."""
    c, generator = torch.ones(3, 3, dtype=torch.float64), torch.Generator().manual_seed(0)
    c[0, 0] = -1.0
    draws = torch.stack([haar_rotated(c, 3, generator) for _ in range(20000)])
    off = draws[:, [0, 0, 1], [1, 2, 2]]
    assert bool((off.mean(0).abs() < 4.0 * off.std(0) / math.sqrt(20000)).all())


def test_chance_is_what_theory_expects_of_many_spikes_in_more_directions() -> None:
    """Zhang, Yang and Tu (2026), eq. 40, for 1 ≪ M ≪ D.

    Its leading corrections are 1/(4M), the diagonal's scatter, and −M/(2D).
    """
    size, count, directions, draws = 900, 30, 60, 200
    c, generator = spikes(count, size), torch.Generator().manual_seed(0)
    assert effective_spikes(c) == count
    values = haar_coupling(c, directions, draws, generator)
    mean, error = float(values.mean()), float(values.std()) / math.sqrt(draws)
    assert error < 2e-3 * mean
    assert mean == pytest.approx(random_coupling(count), rel=1.0 / (4 * count) + count / (2 * size))
    # Two directions on a sphere in M dimensions, which do not overlap by chance as the rows of Q cannot.
    sphere = math.exp(math.lgamma(count / 2) - math.lgamma((count + 1) / 2)) / math.sqrt(math.pi)
    assert mean == pytest.approx(sphere * math.sqrt(1.0 - count / size), abs=4.0 * error)


def test_standard_error_is_that_of_equal_spikes_and_too_small_for_unequal_ones() -> None:
    size, generator = 300, torch.Generator().manual_seed(0)
    equal, unequal = spikes(20, size), torch.diag(torch.arange(1, size + 1, dtype=torch.float64) ** -2.0)
    ratios = []
    for c in (equal, unequal):
        values = haar_coupling(c, 100, 60, generator)
        expected = coupling_test(float(values.mean()), effective_spikes(c), 100).standard_error
        ratios.append(float(values.std()) / expected)
    # A standard deviation of 60 draws is known to 9 %; R is symmetric, so that between 1 and √2 is expected.
    assert 0.7 < ratios[0] < 1.8
    assert ratios[1] > 4.0


def test_coupling_of_rank_one_is_complete() -> None:
    assert haar_coupling(spikes(1, 40), 5, 3).tolist() == pytest.approx([1.0] * 3, abs=ROUNDING)


def test_z_and_p_of_the_paper() -> None:
    found = coupling_test(0.066, 20.0, 2560)
    # Eqs. 47–49, to the digits given there.
    assert found.baseline == pytest.approx(0.178, abs=5e-4)
    assert found.standard_error == pytest.approx(5.27e-5, abs=2e-7)
    assert found.z == (0.066 - found.baseline) / found.standard_error
    assert found.p == 0.0
    # Mills' ratio: φ(z)/|z|, up to 1/z² = 2e-7.
    expected = -0.5 * found.z**2 - math.log(-found.z) - 0.5 * math.log(2.0 * math.pi)
    assert found.log10_p * math.log(10.0) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("z", [-6.0, -1.0, 0.0, 2.5, 9.0])
def test_p_is_the_left_tail(z: float) -> None:
    plain = coupling_test(0.0, 10.0, 50)
    found = coupling_test(plain.baseline + z * plain.standard_error, 10.0, 50)
    assert found.z == pytest.approx(z, abs=1e-10)
    # The slope of log p is |z| + 1/|z|, below 7 here.
    assert found.p == pytest.approx(0.5 * math.erfc(-z / math.sqrt(2.0)), rel=1e-9)
    assert found.log10_p == pytest.approx(math.log10(0.5 * math.erfc(-z / math.sqrt(2.0))), abs=1e-9)


def test_nothing_is_unlikely_where_nothing_is_known() -> None:
    assert all(map(math.isnan, coupling_test(math.nan, math.nan, 10)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: random_coupling(0.0),
            r"spikes must be positive and finite, got 0.0: effective_spikes\(C\) counts them",
        ),
        (lambda: coupling_test(0.1, -1.0, 10), "spikes must be positive and finite, got -1.0"),
        (
            lambda: coupling_test(0.1, 2.0, 1),
            "directions must be a whole number of at least 2, got 1: one direction has none to couple",
        ),
        (lambda: haar_rotated(torch.eye(3), 4), "directions must be between 1 and D = 3, got 4: take as many as R has"),
        (lambda: haar_coupling(torch.eye(3), 0, 1), "directions must be between 1 and D = 3, got 0"),
    ],
)
def test_bad_input(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]


def test_couplings_of_all_leading_blocks_are_those_of_each() -> None:
    c = spikes(3, 12) + torch.eye(12, dtype=torch.float64)
    c[5] = c[:, 5] = 0.0  # a direction without noise has none to couple to
    r = coupling_matrix(haar_rotated(c, 12, torch.Generator().manual_seed(0)))
    r[4] = r[:, 4] = torch.nan
    each = [mean_coupling(r[:n, :n]) for n in range(1, 13)]
    # Sums of 132 numbers in another order.
    assert leading_couplings(r).tolist() == pytest.approx(each, rel=ROUNDING, nan_ok=True)
