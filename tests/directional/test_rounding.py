"""How rounding is foretold and learned: formulas, floors that do not fall with the distance, the first ε."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from lightning_curvature.directional.rounding import Floor, Rounding, first_epsilon, forward_roundoff

U = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def rounding(dtype: torch.dtype = torch.float32, **levels: float) -> Rounding:
    floors = {name: Floor(levels.get(name, 0.0)) for name in ("growth", "offset")}
    return Rounding(dtype, U[dtype], U[dtype], floors["growth"], floors["offset"])


@pytest.mark.parametrize("dtype", U)
def test_unit_roundoff_of_a_type(dtype: torch.dtype) -> None:
    assert forward_roundoff(nn.Linear(1, 1), torch.device("cpu"), dtype) == U[dtype]
    one = torch.ones((), dtype=dtype)
    # The largest number that is lost beside 1, to even.
    assert one + U[dtype] == one
    assert one + 2.0 * U[dtype] > one


@pytest.mark.parametrize("power", [0, 1, 2, 4])
def test_a_floor_is_what_does_not_fall_with_the_distance(power: int) -> None:
    """Distances a third of those before, as ε adapts: a constant is a floor, a power of the distance is none."""
    floor = Floor()
    for distance in (9.0, 3.0, 1.0):
        floor.learn(distance, 0.5 * distance**power)
    assert floor.level == (0.5 if power == 0 else 0.0)


def test_a_floor_falls_with_a_smaller_number_and_has_a_limit() -> None:
    floor = Floor(level=0.5)
    floor.learn(1.0, 0.2)
    assert floor.level == 0.2
    for distance in (9.0, 3.0, 1.0):
        floor.learn(distance, 7.0, limit=7.0)
    assert floor.level == 0.2
    floor.learn(0.3, 6.9, limit=7.0)
    assert floor.level == 6.9


def test_a_floor_remembers_eight_measurements() -> None:
    floor = Floor()
    floor.learn(100.0, 1.0)
    for _ in range(8):
        floor.learn(1.0, 1e-3)
    assert floor.history == [(1.0, 1e-3)] * 8
    floor.learn(10.0, 1.0)  # beside the first one it would have been a floor
    assert floor.level <= 1e-3


def test_variance_of_the_outputs_is_the_expected_one_or_what_the_defect_allows() -> None:
    unit = 2.0 * U[torch.float32]  # κ = 2
    prior = unit**2 * 5.0
    for values, expected in (
        ({"noise_gain": 5.0}, prior),
        ({"noise_gain": 5.0, "defect": 9.0 * prior}, prior),
        ({"noise_gain": 5.0, "defect": 0.15 * prior}, 0.1 * prior),
    ):
        assert rounding().outputs_variance(values) == pytest.approx(expected, rel=1e-12)
    # A growth that was learned takes the place of the expected one, if it is larger.
    assert rounding(growth=6.0).unit == 6.0 * U[torch.float32]
    assert rounding(growth=1.0).unit == unit


def test_deviation_of_the_loss() -> None:
    u = U[torch.float32]
    assert rounding().loss_deviation({"loss": -3.0}) == u * 4.0
    values = {"loss": 3.0, "positions": 16.0, "loss_noise_gain": 0.25}
    # u(|L| + 1/√n) + κu √gain/√n.
    assert rounding().loss_deviation(values) == pytest.approx(u * (3.0 + 0.25) + 2.0 * u * 0.5 / 4.0, rel=1e-12)


def test_deviation_of_the_loss_is_that_of_real_losses() -> None:
    """The logistic loss of 64 logits in float32 against float64: its rounding is foretold to a factor of four."""
    generator = torch.Generator().manual_seed(0)
    errors = []
    for _ in range(200):
        z = torch.randn(64, generator=generator, dtype=torch.float64)
        single = z.float()
        exact = nn.functional.softplus(single.double()).mean()
        errors.append(float(nn.functional.softplus(single).mean().double() - exact))
    seen = math.sqrt(sum(e * e for e in errors) / len(errors))
    # The logits are exact here: only the loss rounds.
    foretold = rounding().loss_deviation({"loss": 0.8, "positions": 64.0, "loss_noise_gain": 0.0})
    assert foretold / 4.0 < seen < foretold


def pair(distance: float, defect: float, slope: float, descent: float) -> dict[str, float]:
    """A pair of losses with a slope; ε is the distance, since ‖d‖ = 1."""
    return {
        "signal": distance**2,
        "defect": defect,
        "noise_gain": 1.0,
        "loss": 1.0,
        "loss_plus": 1.0 + slope * distance,
        "loss_minus": 1.0 - slope * distance,
        "descent": descent,
    }


def test_growth_is_learned_from_a_defect_that_stays() -> None:
    learner, u = rounding(), U[torch.float32]
    for distance in (0.09, 0.03, 0.01):
        learner.learn(pair(distance, 1.5 * (5.0 * u) ** 2, 1.0, 1.0), distance, distance)
    assert learner.growth.level == pytest.approx(5.0, rel=1e-9)
    assert learner.unit == pytest.approx(5.0 * u, rel=1e-9)
    # Beyond eight times the expected κ it is curvature, whatever it did before.
    learner = rounding()
    for distance in (0.09, 0.03, 0.01):
        learner.learn(pair(distance, 1.5 * (17.0 * u) ** 2, 1.0, 1.0), distance, distance)
    assert learner.unit == 2.0 * u


def test_an_offset_of_the_gradient_is_learned_from_the_slope_of_the_pair() -> None:
    learner = rounding(torch.float64)
    for distance in (0.9, 0.3, 0.1):
        learner.learn(pair(distance, 0.0, slope=2.0, descent=1.8), distance, distance)
    assert learner.offset.level == pytest.approx(0.1, rel=1e-9)
    learner.learn(pair(0.1, 0.0, slope=0.0, descent=1.8), 0.1, 0.1)  # no slope tells nothing
    assert learner.offset.level == pytest.approx(0.1, rel=1e-9)


@pytest.mark.parametrize(("dtype", "half"), [(t, t in (torch.bfloat16, torch.float16)) for t in U])
def test_half_precision(dtype: torch.dtype, half: bool) -> None:
    assert rounding(dtype).half is half


def test_the_first_epsilon_balances_rounding_and_truncation() -> None:
    values: dict[str, Any] = {"loss": 2.0, "descent": 0.5, "squared_size": 400.0, "squared_norm": 4.0}
    # ‖θ‖/‖d‖ = 10, of which a tenth: the network bends at ε_T = 1. A = √6 u L/(0.1 gᵀd).
    noise = math.sqrt(6.0) * U[torch.float32] * 2.0 / 0.05
    two_sided = first_epsilon(values, 2.0**-24, symmetric=True)
    assert noise / two_sided**2 == pytest.approx((two_sided / 1.0) ** 2, rel=1e-12)
    one_sided = first_epsilon(values, 2.0**-24, symmetric=False)
    assert noise / one_sided**2 == pytest.approx(one_sided / 1.0, rel=1e-12)
    # Parameters that are zero, or a gradient that is, leave a number all the same.
    for change in ({"squared_size": 0.0}, {"descent": -1.0}, {"descent": 0.0, "loss": 0.0}):
        assert 0.0 < first_epsilon(values | change, 2.0**-24, symmetric=True) < math.inf
