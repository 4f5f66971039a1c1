"""Formulas of sample growth against quadrature, dense derivatives and what the source proves."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from lightning_curvature.functional import (
    QuadraticIncrement,
    decay_slope,
    gaussian_moment,
    increment,
    rate_bound,
    relative_model_error,
    validated_sigma,
)
from tests.helpers.growth import model_of
from tests.oracles.sample_growth import (
    Quadratics,
    dense_increment,
    gaussian_mean,
    mean_hessian,
    random_quadratics,
    top_eigenvectors,
)

# Sums of a few dozen float64 products: 1e-15 each, with no cancellation beyond a factor of a hundred.
ROUNDING = 1e-12


def minimum(losses: Quadratics, k: int) -> torch.Tensor:
    """The point of no gradient of L_k; a saddle where the Hessian is indefinite."""
    pull = torch.einsum("nij,nj->i", losses.matrices[:k], losses.centres[:k])
    return torch.linalg.solve(losses.matrices[:k].sum(0), pull)


@pytest.mark.parametrize("k", [1, 4])
def test_increment_is_the_difference_of_means(k: int) -> None:
    losses = random_quadratics(6, 3).losses(torch.ones(3, dtype=torch.float64))
    expected = losses[: k + 1].mean() - losses[:k].mean()
    torch.testing.assert_close(increment(losses[k], losses[:k].mean(), k), expected, rtol=ROUNDING, atol=ROUNDING)


def test_increment_keeps_the_digits_of_large_losses() -> None:
    # A difference of means rounds at 1e8 · 1e-7 = 10 in float32.
    assert float(increment(torch.tensor(1e8 + 8.0), torch.tensor(1e8), k=7)) == 1.0


@pytest.mark.parametrize("dimension", [1, 2, 3])
@pytest.mark.parametrize("sigma", [1e-3, 0.7, 20.0])
def test_closed_form_is_the_integral(dimension: int, sigma: float) -> None:
    """The square of a quadratic is of degree four, which five nodes integrate exactly."""
    quadratics = random_quadratics(5, 6)
    w = torch.linspace(-1.0, 1.0, 6, dtype=torch.float64)
    basis = top_eigenvectors(mean_hessian(quadratics.losses, w, 4), dimension)
    model = model_of(dense_increment(quadratics.losses, w, 4).within(basis))

    def true_square(z: torch.Tensor) -> torch.Tensor:
        losses = quadratics.losses(w + basis @ z)
        return (losses[:5].mean() - losses[:4].mean()).square()

    expected = gaussian_mean(true_square, dimension, sigma)
    # The true increment is a difference of two means, twenty times larger at most.
    torch.testing.assert_close(gaussian_moment(model, sigma), expected, rtol=1e-10, atol=0.0)


def test_of_several_samples_at_once() -> None:
    quadratics, w = random_quadratics(7, 4), torch.ones(4, dtype=torch.float64)
    ones = [dense_increment(quadratics.losses, w, 3, new) for new in (3, 5, 6)]
    model = QuadraticIncrement(*(torch.stack([getattr(one, name) for one in ones]) for name in ("a", "c", "b")))
    apart = torch.stack([gaussian_moment(model_of(one), 0.3) for one in ones])
    torch.testing.assert_close(gaussian_moment(model, 0.3), apart, rtol=ROUNDING, atol=0.0)
    z = torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(
        model.at(z), torch.stack([model_of(one).at(z) for one in ones], dim=1), rtol=ROUNDING, atol=ROUNDING
    )
    assert model.first(2).dimension == 2
    cut = torch.cat([z[:, :2], torch.zeros(5, 2, dtype=torch.float64)], dim=1)
    torch.testing.assert_close(model.first(2).at(z[:, :2]), model.at(cut), rtol=ROUNDING, atol=ROUNDING)


def pure_quadratic(changes: torch.Tensor) -> QuadraticIncrement:
    """Both Hessians share their eigenvectors; their eigenvalues differ by ``changes``, value and gradient are equal."""
    return QuadraticIncrement(torch.zeros(()), torch.zeros(len(changes)), torch.diag(changes))


def test_shared_eigenvectors_without_value_and_gradient() -> None:
    """Curvature-aligned probing (2026), corollary 4."""
    changes = torch.tensor([0.7, -0.2, 0.1], dtype=torch.float64)
    expected = 0.4**4 / 4 * (2.0 * changes.square().sum() + changes.sum() ** 2)
    torch.testing.assert_close(gaussian_moment(pure_quadratic(changes), 0.4), expected, rtol=ROUNDING, atol=0.0)


def test_top_directions_are_extremal() -> None:
    """Curvature-aligned probing (2026), lemma 5: among the subspaces of eigenvectors, where no eigenvalue falls."""
    changes = torch.tensor([0.9, 0.5, 0.4, 0.05, 0.0], dtype=torch.float64)
    values = {
        chosen: float(gaussian_moment(pure_quadratic(changes[list(chosen)]), 1.0))
        for chosen in itertools.combinations(range(5), 3)
    }
    assert max(values, key=values.__getitem__) == (0, 1, 2)
    assert len(set(values.values())) == len(values)


@pytest.mark.parametrize("k", [1, 5, 19])
@pytest.mark.parametrize("sigma", [1e-2, 1.0])
def test_bound_holds_at_a_stationary_point(k: int, sigma: float) -> None:
    quadratics = random_quadratics(20, 5)
    w = minimum(quadratics, k)
    one = dense_increment(quadratics.losses, w, k)
    sizes = (
        float(quadratics.losses(w).abs().max()),
        float(quadratics.gradients(w).norm(dim=1).max()),
        float(torch.linalg.eigvalsh(quadratics.matrices).abs().max()),
    )
    for dimension in (1, 5):
        basis = top_eigenvectors(mean_hessian(quadratics.losses, w, k), dimension)
        bound = rate_bound(*sizes, k=k, dimension=dimension, sigma=sigma)
        value = float(gaussian_moment(model_of(one.within(basis)), sigma))
        # It is no looser than the constants of its proof: 3 for three terms, and what the largest of samples costs.
        assert value <= bound <= 1e5 * value


def test_bound_is_reached_by_each_term_alone() -> None:
    """A third of each term: the proof splits the square of a sum of three."""
    a, c, b = torch.tensor(2.0), torch.tensor([0.0]), torch.tensor([[0.0]])
    assert 3.0 * gaussian_moment(QuadraticIncrement(a / 2, c, b), 1.0) == rate_bound(
        1, 0, 0, k=1, dimension=1, sigma=1.0
    )
    c = torch.tensor([1.0])
    assert 3.0 * gaussian_moment(QuadraticIncrement(0 * a, c / 2, b), 3.0) == rate_bound(
        0, 1, 0, k=1, dimension=1, sigma=3.0
    )
    b = 2.0 * torch.eye(4)
    assert 3.0 * gaussian_moment(QuadraticIncrement(0 * a, torch.zeros(4), b / 2), 1.0) == rate_bound(
        0, 0, 1, k=1, dimension=4, sigma=1.0
    )


def test_squared_criteria_of_independent_samples_fall_as_one_over_k_squared() -> None:
    """Averaged over the new sample, so that what is left is the factor 1/(k+1)² and the drift of the mean before it."""
    quadratics = random_quadratics(900, 4, seed=3)
    w = torch.zeros(4, dtype=torch.float64)
    sizes, values = [1, 3, 10, 30, 100, 300], []
    for k in sizes:
        losses, gradients = quadratics.losses(w), quadratics.gradients(w)
        new = slice(500, 900)
        model = QuadraticIncrement(
            increment(losses[new], losses[:k].mean(), k),
            increment(gradients[new], gradients[:k].mean(0), k),
            increment(quadratics.matrices[new], quadratics.matrices[:k].mean(0), k),
        )
        values.append(float(gaussian_moment(model, 0.5).mean()))
    found = decay_slope(sizes, values)
    # Before k = 10 the mean itself scatters: E(ℓ − L_k)² = (1 + 1/k) Var, which makes the slope steeper by up to
    # log(2)/log(150) = 0.14 in all.
    assert -2.16 < found.slope < -1.95
    assert found.standard_error < 0.1


def test_slope_of_a_power_law_and_of_what_is_none() -> None:
    found = decay_slope([1, 4, 9, 99], [3.0 * (k + 1) ** -1.5 for k in (1, 4, 9, 99)])
    assert found.slope == pytest.approx(-1.5, abs=1e-12)
    assert found.standard_error == pytest.approx(0.0, abs=1e-12)
    assert math.exp(found.intercept) == pytest.approx(3.0)
    assert all(map(math.isnan, decay_slope([1, 2, 3], [1.0, 0.0, math.nan])))
    assert all(map(math.isnan, decay_slope([], [])))
    two = decay_slope([1, 3], [1.0, 0.5])
    assert two.slope == pytest.approx(-1.0)
    assert math.isnan(two.standard_error)


def test_standard_error_of_the_slope_covers_it() -> None:
    generator, sizes, hits = torch.Generator().manual_seed(0), [2**i for i in range(8)], 0
    for _ in range(400):
        noise = 0.3 * torch.randn(8, generator=generator, dtype=torch.float64)
        found = decay_slope(
            sizes, [math.exp(-2.0 * math.log(k + 1) + e) for k, e in zip(sizes, noise.tolist(), strict=True)]
        )
        hits += abs(found.slope + 2.0) <= 2.447 * found.standard_error  # Student's t, 6 degrees, 95 %
    # 400 trials of 95 %: 380 ± 4.4.
    assert 380 - 4 * 4.4 <= hits <= 380 + 4 * 4.4


def test_model_error_bounds_the_error_of_the_criterion() -> None:
    generator = torch.Generator().manual_seed(0)
    true, model = torch.randn(2, 50, generator=generator, dtype=torch.float64)
    model = true + 0.3 * model
    error = relative_model_error(true, model)
    roots = [float(values.square().mean().sqrt()) for values in (true, model)]
    assert 0.2 < error < 0.4
    assert abs(roots[1] - roots[0]) <= error * roots[0]
    assert relative_model_error(true, true) == 0.0
    assert math.isnan(relative_model_error(torch.zeros(3), model[:3]))
    assert math.isnan(relative_model_error(1e-9 * true, model, rounding=1e-8))
    assert relative_model_error(true, model, rounding=1e-8) == error


def test_validated_sigma() -> None:
    assert validated_sigma([1e-2, 1e-4, 1e-3], [0.5, 0.01, 0.1]) == 1e-3
    # A larger one that fits by chance does not count.
    assert validated_sigma([1.0, 2.0, 3.0], [0.0, 0.2, 0.0]) == 1.0
    assert math.isnan(validated_sigma([1.0, 2.0], [math.nan, 0.0]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: increment(torch.ones(()), torch.ones(()), 0),
            "k must be a whole number of at least 1, got 0: the mean before must hold",
        ),
        (
            lambda: QuadraticIncrement(torch.zeros(2), torch.zeros(2, 3), torch.zeros(2, 2, 2)),
            r"b must be \(…, D, D\) with … = \(2,\) of a, D = 3 of c, got \(2, 2, 2\): give one of each a sample",
        ),
        (
            lambda: gaussian_moment(QuadraticIncrement(torch.zeros(()), torch.zeros(1), torch.zeros(1, 1)), 0.0),
            "sigma must be positive and finite, got 0.0: 1e-3 is a usual width",
        ),
        (lambda: gaussian_moment(pure_quadratic(torch.ones(2)), -1.0), "sigma must be positive and finite, got -1.0"),
        (lambda: rate_bound(1, 1, 1, k=1, dimension=1, sigma=math.inf), "sigma must be positive and finite, got inf"),
        (
            lambda: rate_bound(1, 1, 1, k=0, dimension=2, sigma=1),
            "k must be a whole number of at least 1, got 0: the mean",
        ),
        (lambda: validated_sigma([1.0], []), "errors must hold one for each of sigmas, got 0 for 1"),
    ],
)
def test_bad_input(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
