"""Moments of draws, the standard error of a ratio of means, and the law of GNI and IAS over batch sizes."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_curvature.functional import (
    NoiseTerms,
    add_to_moments,
    batch_factor,
    merge_moments,
    ratio_of_means,
    ratio_standard_error,
)
from tests.helpers.runs import classification, mlp
from tests.oracles.mini_batches import MiniBatches

EMPTY = torch.zeros(6, dtype=torch.float64)
# Sums of up to 50 terms of one size in another order, a rounding of 1e-16 each; S is a difference of such.
ROUNDING = 1e-13


def one_pass(x: Tensor, y: Tensor) -> Tensor:
    moments = EMPTY
    for numerator, denominator in zip(x.tolist(), y.tolist(), strict=True):
        moments = add_to_moments(moments, numerator, denominator)
    return moments


def textbook(x: Tensor, y: Tensor) -> Tensor:
    """Moments of rows of draws, (..., 6)."""
    dx, dy = x - x.mean(-1, keepdim=True), y - y.mean(-1, keepdim=True)
    count = torch.full(x.shape[:-1], float(x.shape[-1]), dtype=torch.float64)
    products = [(a * b).sum(-1) for a, b in ((dx, dx), (dx, dy), (dy, dy))]
    return torch.stack([count, x.mean(-1), y.mean(-1), *products], dim=-1)


def draws(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Numerators that go with their denominators, as curvatures go with squared norms."""
    g = torch.Generator().manual_seed(seed)
    y = 1.0 + torch.rand(*shape, generator=g, dtype=torch.float64)
    return 3.0 * y + torch.randn(*shape, generator=g, dtype=torch.float64), y


def test_one_pass_is_the_textbook() -> None:
    x, y = draws(50)
    torch.testing.assert_close(one_pass(x, y), textbook(x, y), rtol=ROUNDING, atol=ROUNDING)


def test_a_large_mean_does_not_drown_the_scatter() -> None:
    """Sums of squares less the square of the sum would lose 16 digits here."""
    x, y = draws(50)
    found = one_pass(x + 1e8, y)
    # Draws of 1e8 are known to 1e-8; their deviations, and so S relatively, to that.
    torch.testing.assert_close(found[3:], textbook(x, y)[3:], rtol=1e-7, atol=0.0)


@pytest.mark.parametrize("cuts", [(50,), (20, 50), (0, 1, 30, 30, 50), (50, 50)])
def test_merged_parts_are_one_pass(cuts: tuple[int, ...]) -> None:
    x, y = draws(50)
    bounds = [0, *cuts]
    parts = [one_pass(x[a:b], y[a:b]) for a, b in itertools.pairwise(bounds)]
    merged = merge_moments(torch.stack(parts))
    torch.testing.assert_close(merged, one_pass(x, y), rtol=ROUNDING, atol=ROUNDING)
    assert merged.dtype == torch.float64


def test_merging_nothing_is_nothing() -> None:
    assert torch.equal(merge_moments(torch.stack([EMPTY, EMPTY])), EMPTY)


@pytest.mark.parametrize("value", [0.1, 1e300, 1e-300, -7.3])
def test_equal_draws_have_no_scatter_at_all(value: float) -> None:
    """Neither in one pass nor merged from three ranks, whatever their mean rounds to."""
    constant = torch.full((7,), value, dtype=torch.float64)
    x, y = constant, torch.full_like(constant, 0.3)
    parts = [one_pass(x[:k], y[:k]) for k in (3, 0, 1)]
    for moments in (one_pass(x, y), merge_moments(torch.stack([*parts, one_pass(x, y)]))):
        assert moments[1:].tolist() == [value, 0.3, 0.0, 0.0, 0.0]
        assert ratio_standard_error(moments).item() == 0.0


def test_standard_error_of_a_mean() -> None:
    x, _ = draws(50)
    moments = one_pass(x, torch.ones_like(x))
    assert ratio_of_means(moments).item() == pytest.approx(x.mean().item(), rel=ROUNDING)
    assert ratio_standard_error(moments).item() == pytest.approx((x.std() / 50**0.5).item(), rel=ROUNDING)


def test_standard_error_of_a_ratio_is_that_of_the_residuals() -> None:
    x, y = draws(50)
    moments, ratio = one_pass(x, y), x.mean() / y.mean()
    truth = ((x - ratio * y).square().sum() / (50 * 49)).sqrt() / y.mean()
    assert ratio_of_means(moments).item() == pytest.approx(ratio.item(), rel=ROUNDING)
    assert ratio_standard_error(moments).item() == pytest.approx(truth.item(), rel=10 * ROUNDING)


def test_standard_error_is_the_scatter_of_the_ratio() -> None:
    """Over 4,000 repetitions of 100 draws."""
    repetitions, count = 4000, 100
    x, y = draws(repetitions, count)
    moments = textbook(x, y)
    scatter = ratio_of_means(moments).std().item()
    expected = ratio_standard_error(moments).square().mean().sqrt().item()
    # The scatter is known to 1/√(2·4000), 1.1 %, of which 4; the first order leaves out terms of 1/n times the squared
    # variation of y, 1/27: below 0.1 %.
    assert expected == pytest.approx(scatter, rel=0.046)
    # Ratios of single draws have another mean; and taking y as fixed would give twice the error.
    naive = (moments[:, 3] / (count * (count - 1))).sqrt().mean() / y.mean()
    assert naive.item() > 1.3 * scatter


def test_proportional_draws_scatter_by_rounding_alone() -> None:
    _, y = draws(50)
    # The root of a rounding of Sxx, 9 Syy: 3·√1e-15·std(y)/√50/mean(y).
    assert 0.0 <= ratio_standard_error(one_pass(3.0 * y, y)).item() < 1e-8


def test_too_few_draws_and_denominators_that_noise_hides_are_nan() -> None:
    assert ratio_of_means(EMPTY).isnan()
    assert ratio_standard_error(EMPTY).isnan()
    single = add_to_moments(EMPTY, 2.0, 4.0)
    assert ratio_of_means(single).item() == 0.5
    assert ratio_standard_error(single).isnan()
    negative = add_to_moments(add_to_moments(EMPTY, 2.0, 1.0), 2.0, -3.0)
    assert ratio_of_means(negative).isnan()
    assert ratio_standard_error(negative).isnan()
    assert ratio_of_means(add_to_moments(EMPTY, torch.nan)).isnan()


def test_moments_take_tensors_of_any_type() -> None:
    moments = add_to_moments(EMPTY, torch.tensor(2.0, dtype=torch.bfloat16), torch.tensor(4.0))
    assert moments.dtype == torch.float64
    assert moments.tolist() == [1.0, 2.0, 4.0, 0.0, 0.0, 0.0]
    assert torch.equal(EMPTY, torch.zeros(6, dtype=torch.float64))  # not in place


@pytest.mark.parametrize("replacement", [False, True])
def test_batch_factor_is_the_variance_of_a_mean(replacement: bool) -> None:
    values = torch.tensor([1.0, -2.0, 4.0, 0.5], dtype=torch.float64)
    for size in (1, 2, 3, 4):
        chosen = itertools.product(values, repeat=size) if replacement else itertools.combinations(values, size)
        means = torch.stack([torch.stack(c).mean() for c in chosen])
        variance = means.var(unbiased=False) / values.var(unbiased=False)
        assert batch_factor(size, 4, replacement) == pytest.approx(variance.item(), rel=ROUNDING, abs=1e-30)


SAMPLES = 5


@functools.cache
def oracle(size: int, replacement: bool) -> MiniBatches:
    ((x, y),) = classification(1, SAMPLES)
    return MiniBatches(mlp(4, 3, 3), F.cross_entropy, x, y, size, replacement)


@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize("measured", [1, 2])
def test_one_batch_size_gives_all_others(measured: int, replacement: bool) -> None:
    truth = oracle(measured, replacement)
    terms = NoiseTerms.from_batches(
        batch_curvature=float(truth.full_curvatures().mean()),
        batch_square=float(truth.squares().mean()),
        gradient_curvature=truth.gradient_curvature(),
        gradient_square=float(truth.gradient.square().sum()),
        batch_size=measured,
        samples=SAMPLES,
        replacement=replacement,
    )
    # Sums over 25 batches and 27² entries, each of a few roundings, and one division by a factor of 3/8.
    close = {"rel": 1e-12}
    assert terms.noise_curvature == pytest.approx(truth.noise_curvature(), **close)
    assert terms.noise_square == pytest.approx(truth.noise_square(), **close)
    for other, with_replacement in [(1, False), (2, False), (3, False), (5, False), (1, True), (2, True), (3, True)]:
        expected = oracle(other, with_replacement)
        assert terms.gni(other, with_replacement).item() == pytest.approx(expected.gni(), **close)
        assert terms.ias(other, with_replacement).item() == pytest.approx(expected.ias(), **close)
    sizes = [1, 2, 5]
    for law in (terms.gni, terms.ias):
        assert torch.equal(law(sizes), torch.stack([law(size) for size in sizes]))
        assert law(sizes).dtype == torch.float64


def test_all_samples_are_without_noise() -> None:
    terms = NoiseTerms(1.5, 2.0, 0.5, 4.0, samples=7)
    assert terms.gni(7).item() == terms.ias(7).item() == 3.0
    assert terms.gni(7, replacement=True).item() != 3.0


def test_bad_batch_sizes_are_explained() -> None:
    terms = NoiseTerms(1.5, 2.0, 0.5, 4.0, samples=7)
    with pytest.raises(
        ValueError,
        match=r"^batch_size must be a whole number of at least 1, got 0: count the samples of a mini-batch\.$",
    ):
        terms.gni([1, 0], replacement=True)
    above = r"^batch_size must not be above the number of samples, 7, got 8: larger batches need replacement=True"
    with pytest.raises(ValueError, match=above):
        terms.ias(8)
    assert terms.ias(8, replacement=True).isfinite()
    with pytest.raises(
        ValueError, match=r"^batch_size must be below the number of samples, got 7 of 7: batches of all"
    ):
        NoiseTerms.from_batches(
            batch_curvature=1.0,
            batch_square=1.0,
            gradient_curvature=1.0,
            gradient_square=1.0,
            batch_size=7,
            samples=7,
        )
