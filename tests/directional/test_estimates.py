"""Quadratic forms and their errors, from the numbers of a measurement that are known in closed form."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from lightning_curvature.directional.estimates import NOISE_LIMIT, Estimate, estimate, loss_descent
from lightning_curvature.directional.rounding import Floor, Numbers, Rounding

# L(θ − xd) = 2 − 0.5x + ½·0.3x² + c₃x³/6 + c₄x⁴/24: gᵀd = 0.5, dᵀHd = 0.3.
LOSS, DESCENT, QUADRATIC = 2.0, 0.5, 0.3


def rounding(dtype: torch.dtype = torch.float64) -> Rounding:
    unit = torch.finfo(dtype).eps / 2.0
    return Rounding(dtype, unit, unit, Floor(), Floor())


def numbers(epsilon: float, third: float = 0.0, fourth: float = 0.0, outputs: bool = True) -> Numbers:
    """Losses at θ ± εd; with outputs that move in proportion, G = H but for the network's own second derivative."""

    def at(x: float) -> float:
        return LOSS - DESCENT * x + QUADRATIC * x**2 / 2.0 + third * x**3 / 6.0 + fourth * x**4 / 24.0

    # θ + εd is at x = −ε.
    found = {"loss": LOSS, "loss_plus": at(-epsilon), "loss_minus": at(epsilon), "descent": DESCENT}
    if outputs:
        found |= {"signal": QUADRATIC * epsilon**2, "defect": 0.0, "noise_gain": 1.0, "loss_noise_gain": 0.0}
        found |= {"positions": 64.0, "third": 0.0, "fourth": 0.0}
    return found


def test_a_quadratic_loss_gives_its_curvature() -> None:
    found = estimate(("kl", "finite_difference"), numbers(0.1), 0.1, 0.1, rounding())
    assert found.keys() == {"kl", "finite_difference"}
    # A second difference of numbers near 2 at ε = 0.1: 4·2·2⁻⁵³/(0.3·0.01), some 3e-13.
    assert found["finite_difference"].quadratic == pytest.approx(QUADRATIC, rel=1e-12)
    assert found["kl"].quadratic == pytest.approx(QUADRATIC, rel=1e-15)
    for one in found.values():
        assert one.model is not None
        assert 0.0 <= one.error < 1e-10


@pytest.mark.parametrize("outputs", [True, False])
@pytest.mark.parametrize("third", [0.3, 1.0])
def test_the_error_covers_what_a_third_order_may_hide(third: float, outputs: bool) -> None:
    """With φ⁗ = φ‴²/q, as is guessed from the slope: off by φ⁗ε²/12q = 3r², where r = εφ‴/6q is known.

    One and a half times that is reported.
    """
    epsilon, fourth = 0.2, third**2 / QUADRATIC
    values = numbers(epsilon, third, fourth, outputs)
    one = estimate(("finite_difference",), values, epsilon, epsilon, rounding())["finite_difference"]
    off = abs(one.quadratic - QUADRATIC) / QUADRATIC
    assert off == pytest.approx(fourth * epsilon**2 / 12.0 / QUADRATIC, rel=1e-6)
    # Beside the value that was found, which is larger: 3r² of that is less than 3r² of the true one, by one power more.
    ratio = epsilon * third / 6.0 / one.quadratic
    assert one.error == pytest.approx(1.5 * 3.0 * ratio**2, rel=1e-6)
    assert off <= one.error / 1.5 * (1.0 + off) ** 2 * (1.0 + 1e-6)


@pytest.mark.parametrize("name", ["kl", "finite_difference"])
def test_noise_hides_a_value_and_the_model_says_so(name: str) -> None:
    """In float32 at ε = 1e-5 the second difference is 1e-11 of a loss of 2: there is nothing of it left."""
    values = numbers(1e-5) | {"noise_gain": 1e4, "defect": 1.0}
    one = estimate((name,), values, 1e-5, 1e-5, rounding(torch.float32))[name]
    assert math.isnan(one.quadratic)
    assert one.model is not None
    assert one.model.noise + one.model.crossed > NOISE_LIMIT


@pytest.mark.parametrize(
    ("change", "truncated"), [({"loss_plus": math.inf}, True), ({"loss_plus": LOSS, "loss_minus": LOSS}, False)]
)
def test_nothing_moved_or_everything_overflowed(change: Numbers, truncated: bool) -> None:
    """ε is then changed by a lot: made smaller, or larger."""
    one = estimate(("finite_difference",), numbers(0.1) | change, 0.1, 0.1, rounding())["finite_difference"]
    assert math.isnan(one.quadratic)
    assert math.isnan(one.error)
    assert one.model is not None
    assert (one.model.truncation > 1e5) is truncated
    assert (one.model.noise > 1e5) is not truncated


@pytest.mark.parametrize(("dtype", "roundings"), [(torch.float64, 32.0), (torch.float32, 32.0), (torch.bfloat16, 2.0)])
def test_exact_products_have_a_few_roundings(dtype: torch.dtype, roundings: float) -> None:
    values = {"hvp_quadratic": 0.3, "gauss_newton_quadratic": 0.4, "descent": DESCENT}
    found = estimate(("hvp", "gauss_newton"), values, 0.1, 0.1, rounding(dtype))
    assert {name: one.quadratic for name, one in found.items()} == {"hvp": 0.3, "gauss_newton": 0.4}
    assert all(one.error == roundings * torch.finfo(dtype).eps for one in found.values())
    assert all(one.model is None for one in found.values())


def test_a_kink_between_the_ends_adds_to_the_error() -> None:
    """k|x − s| adds 2k(ε − s) to the second difference and k(ε − s) to the slope."""
    epsilon, jump, place = 0.1, 0.2, 0.05
    values = numbers(epsilon)
    values["loss_minus"] += 2.0 * jump * (epsilon - place)
    one = estimate(("finite_difference",), values, epsilon, epsilon, rounding())["finite_difference"]
    off = abs(one.quadratic - QUADRATIC) / one.quadratic
    assert off > 0.5
    assert one.error > 0.25


def test_the_error_of_the_descent_counts() -> None:
    """gᵀd is off by κu√(gain · dᵀGd), of which half is added, as a share of gᵀd."""
    values = numbers(0.1) | {"noise_gain": 1e20}
    small, large = (
        estimate(("hvp",), values | {"hvp_quadratic": QUADRATIC, "noise_gain": gain}, 0.1, 0.1, rounding())["hvp"]
        for gain in (0.0, 1e20)
    )
    bound = 2.0 * 2.0**-53 * math.sqrt(1e20 * QUADRATIC)
    assert large.error - small.error == pytest.approx(0.5 * bound / DESCENT, rel=1e-9)


def test_descent_of_the_kept_gradient_or_of_the_pair() -> None:
    values, epsilon = numbers(0.1), 0.1
    pair = estimate(("finite_difference",), values, epsilon, epsilon, rounding())["finite_difference"]
    assert loss_descent(values, epsilon, rounding(), pair) == (DESCENT, True, True)
    # A gradient that something cut to a tenth after backward, as clipping does: the slope of the pair is the loss's.
    changed = values | {"descent": 0.05}
    slope, kept, same = loss_descent(changed, epsilon, rounding(), pair)
    assert slope == pytest.approx(DESCENT, rel=1e-12)
    assert (kept, same) == (False, True)
    # One that the loss has been differentiated for: the pair's is another function.
    assert loss_descent(changed | {"hvp_descent": 0.05}, epsilon, rounding(), pair) == (0.05, True, False)
    assert loss_descent(changed | {"head_slope": 0.05 * epsilon}, epsilon, rounding(), pair) == (0.05, True, False)
    by_outputs, kept, same = loss_descent(changed | {"head_slope": DESCENT * epsilon}, epsilon, rounding(), pair)
    assert (by_outputs, kept, same) == (pytest.approx(DESCENT), False, True)
    # Where the pair is no evidence, the kept one stays.
    assert pair.model is not None
    wide = replace(pair, model=replace(pair.model, truncation=0.4))
    for doubtful in (None, Estimate(math.nan, math.nan, pair.model), Estimate(0.3, 0.0, None), wide):
        assert loss_descent(changed, epsilon, rounding(), doubtful) == (0.05, True, True)
    # An exact product has differentiated the loss itself.
    assert loss_descent(changed | {"hvp_descent": 0.7}, epsilon, rounding(), pair) == (0.7, True, True)
