"""The choice of ε against the closed-form minimum of each error model."""

import math

import pytest

from lightning_curvature.functional import ErrorModel, choose_epsilon

# The search looks at 81 factors, evenly spaced in the logarithm over a decade and a half: neighbours are 4.7 % apart.
GRID = 0.03


@pytest.mark.parametrize(("noise", "truncation"), [(1e-3, 1e-3), (1e-4, 1e-3), (1e-3, 1e-4), (1e-6, 1e-4)])
def test_two_sided_errors_balance(noise: float, truncation: float) -> None:
    # d/df (n/f² + t·f²) = 0 at f⁴ = n/t.
    best = 0.5 * (noise / truncation) ** 0.25
    assert choose_epsilon(0.5, [ErrorModel(noise, truncation)]) == pytest.approx(best, rel=GRID)


@pytest.mark.parametrize(("noise", "truncation"), [(1e-3, 2e-3), (1e-5, 1e-3), (1e-3, 1e-4)])
def test_one_sided_errors_balance(noise: float, truncation: float) -> None:
    # d/df (n/f² + t·f) = 0 at f³ = 2n/t.
    best = 2.0 * (2.0 * noise / truncation) ** (1 / 3)
    assert choose_epsilon(2.0, [ErrorModel(noise, truncation, order=1)]) == pytest.approx(best, rel=GRID)


def test_noise_across_the_signal_balances() -> None:
    # d/df (c/f + t·f²) = 0 at f³ = c/2t.
    best = (1e-3 / 2e-4) ** (1 / 3)
    assert choose_epsilon(1.0, [ErrorModel(0.0, 1e-4, crossed=1e-3)]) == pytest.approx(best, rel=GRID)


def test_one_move_is_at_most_a_tenth_or_four_times() -> None:
    assert choose_epsilon(3.0, [ErrorModel(0.0, 1e-3)]) == pytest.approx(0.3)
    assert choose_epsilon(3.0, [ErrorModel(1e-3, 0.0)]) == pytest.approx(12.0)


def test_the_rule_finds_the_best_epsilon_from_far_away() -> None:
    """Repeated, with errors that follow their model exactly, it ends at the optimum of the model."""
    epsilon, noise, truncation = 1e3, 1e-7, 1e-2
    for _ in range(8):
        epsilon = choose_epsilon(epsilon, [ErrorModel(noise / epsilon**2, truncation * epsilon**2)])
    assert epsilon == pytest.approx((noise / truncation) ** 0.25, rel=GRID)


def test_an_estimator_that_is_lost_does_not_outvote_one_that_can_be_had() -> None:
    lost, good = ErrorModel(1e6, 0.0), ErrorModel(0.0, 1e-2)
    # By errors alone the first would pull ε up; x/(1 + x) is flat for it.
    assert choose_epsilon(1.0, [lost, good]) == pytest.approx(0.1)
    assert choose_epsilon(1.0, [ErrorModel(1.0, 0.0), good]) > 1.0


def test_weights_decide_between_two() -> None:
    up, down = ErrorModel(1e-2, 0.0), ErrorModel(0.0, 1e-2)
    for weight in (16.0, 1.0, 1 / 16.0):
        # d/df (w·n/f² + t·f²) = 0 at f⁴ = w·n/t; x/(1 + x) bends that by x ≤ 4 %.
        expected = weight**0.25
        chosen = choose_epsilon(1.0, [ErrorModel(up.noise, up.truncation, weight=weight), down])
        assert chosen == pytest.approx(expected, rel=GRID + 0.04)


@pytest.mark.parametrize(
    "models", [[], [ErrorModel(math.nan, 1.0)], [ErrorModel(1.0, math.inf)], [ErrorModel(math.inf, math.nan)]]
)
def test_without_a_finite_model_epsilon_stays(models: list[ErrorModel]) -> None:
    assert choose_epsilon(0.7, models) == 0.7


def test_models_that_are_not_finite_do_not_count() -> None:
    good = ErrorModel(1e-4, 1e-3)
    assert choose_epsilon(1.0, [good, ErrorModel(math.nan, 0.0)]) == choose_epsilon(1.0, [good])


def test_total_is_the_model_at_a_factor() -> None:
    model = ErrorModel(noise=8.0, truncation=3.0, order=1, crossed=2.0)
    assert model.total() == 13.0
    assert model.total(2.0) == 8.0 / 4 + 2.0 / 2 + 3.0 * 2
