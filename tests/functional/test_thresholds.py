"""The thresholds against the recursions they belong to: their exact spectral radius, and torch.optim's own steps."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_curvature.functional import adaptive_threshold, mean_square_index, momentum_threshold, sharpness_plateaus

LR = 0.3
# Relative distance at which the radius must be on the right side of 1. The dominant root moves by 1.5 (AdamW without
# momentum, ηλ = 0.45) to 400 times that distance; its rounding is 1e-16 times entries of 4 over the distance of the
# two roots, 1 − 0.99, hence below 1e-13.
NEAR = 1e-9

MOMENTUM: list[dict[str, Any]] = [
    {},
    {"momentum": 0.5},
    {"momentum": 0.99},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.3, "nesterov": True},
    {"momentum": 0.9, "dampening": 0.6},
    {"momentum": 0.9, "dampening": -0.5},
    {"dampening": 0.6},  # without momentum torch has no buffer to dampen
    {"dampening": 1.0},
    {"weight_decay": 2.0},
    {"momentum": 0.9, "dampening": 0.6, "weight_decay": 2.0},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 2.0},
]
ADAPTIVE: list[dict[str, Any]] = [
    {},
    {"beta1": 0.9},
    {"beta1": 0.99},
    {"beta1": 0.9, "decoupled_weight_decay": 1.5},
    {"decoupled_weight_decay": 1.5},
    {"beta1": 0.9, "bias_correction": 1.0 - 0.9**3},
    {"beta1": 0.9, "decoupled_weight_decay": 1.5, "bias_correction": 0.1},
]


def _momentum_step(
    a: float, momentum: float = 0.0, dampening: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0
) -> Tensor:
    """One step of torch.optim.SGD on ½ a θ² as a matrix on (θ, b), written off its documentation."""
    g = torch.tensor([a + weight_decay, 0.0], dtype=torch.float64)
    theta, b = torch.eye(2, dtype=torch.float64)
    b = momentum * b + (1.0 - dampening) * g if momentum else g
    return torch.stack([theta - LR * (g + momentum * b if nesterov else b), b if momentum else 0.0 * b])


def _adaptive_step(
    a: float, beta1: float = 0.0, decoupled_weight_decay: float = 0.0, bias_correction: float = 1.0
) -> Tensor:
    """One step of torch.optim.AdamW on ½ a θ² with P = 1 as a matrix on (θ, m), written off its documentation."""
    theta, m = torch.eye(2, dtype=torch.float64)
    m = beta1 * m + (1.0 - beta1) * a * theta
    return torch.stack([theta - LR * decoupled_weight_decay * theta - LR * m / bias_correction, m])


CASES = [(momentum_threshold, _momentum_step, options) for options in MOMENTUM]
CASES += [(adaptive_threshold, _adaptive_step, options) for options in ADAPTIVE]  # type: ignore[list-item]


def _radius(matrix: Tensor) -> float:
    return torch.linalg.eigvals(matrix).abs().max().item()


@pytest.mark.parametrize(("threshold", "step", "options"), CASES)
def test_the_spectral_radius_crosses_one(
    threshold: Callable[..., float], step: Callable[..., Tensor], options: dict[str, Any]
) -> None:
    edge = threshold(LR, **options)
    shift = options.get("weight_decay", 0.0)
    assert _radius(step((edge + shift) * (1.0 - NEAR) - shift, **options)) < 1.0
    assert _radius(step((edge + shift) * (1.0 + NEAR) - shift, **options)) > 1.0


@pytest.mark.parametrize(("threshold", "step", "options"), CASES)
def test_no_root_leaves_the_circle_before(
    threshold: Callable[..., float], step: Callable[..., Tensor], options: dict[str, Any]
) -> None:
    shift = options.get("weight_decay", 0.0)
    edge = threshold(LR, **options) + shift
    assert all(_radius(step(edge * k / 200 - shift, **options)) < 1.0 for k in range(1, 200))
    assert all(_radius(step(edge * k / 200 - shift, **options)) > 1.0 for k in range(201, 400))


# What settles the question: ten steps in a row below the first bound, or one above the second. One per cent off the
# edge the dominant root is off the circle by at least 0.5 % (momentum 0.99, which contracts as its square root): 3000
# steps make that e¹⁵. Roots at least 0.01 apart swing up by at most a factor of 100 before they settle.
SMALL, LARGE, STEPS = 1e-2, 1e3, 3000


def _diverges(optimizer: torch.optim.Optimizer, x: Tensor, a: float) -> bool:
    """Whether the optimizer's own steps on ½ a x², from x = 1, blow up; if they do not, they must shrink."""
    quiet = 0
    for _ in range(STEPS):
        x.grad = a * x.detach()
        optimizer.step()
        size = abs(x.item())
        quiet = quiet + 1 if size < SMALL else 0
        if size > LARGE or quiet == 10:
            return size > LARGE
    raise AssertionError(f"neither grown nor shrunk: {size}")


def _unit() -> Tensor:
    return torch.nn.Parameter(torch.ones((), dtype=torch.float64))


@pytest.mark.parametrize("options", MOMENTUM)
def test_sgd_of_torch_has_this_edge(options: dict[str, Any]) -> None:
    shift = options.get("weight_decay", 0.0)
    edge = momentum_threshold(LR, **options) + shift
    for factor, diverges in ((0.99, False), (1.01, True)):
        x = _unit()
        assert _diverges(torch.optim.SGD([x], lr=LR, **options), x, edge * factor - shift) is diverges


@pytest.mark.parametrize(("beta1", "decay"), [(0.0, 0.0), (0.9, 0.0), (0.9, 1.5)])
def test_adamw_of_torch_has_this_edge(beta1: float, decay: float) -> None:
    root = 3.0  # P
    edge = root * adaptive_threshold(LR, beta1, decoupled_weight_decay=decay)
    for factor, diverges in ((0.99, False), (1.01, True)):
        x = _unit()
        # P stands still: late in training both corrections are 1, and the second moment decays by 1 − 1e-16 a step.
        optimizer = torch.optim.AdamW([x], lr=LR, betas=(beta1, 1.0 - 2.0**-53), eps=0.0, weight_decay=decay)
        zero = torch.zeros_like(x.detach())
        state = {"step": torch.tensor(1e18), "exp_avg": zero.clone(), "exp_avg_sq": zero + root**2}
        optimizer.state[x] = state
        assert _diverges(optimizer, x, edge * factor) is diverges
        # It lets in 1e-16 g², g at most a·10⁴ = 4e6 in the last step (of growth by a tenth or so each): 2e-3 of P².
        assert state["exp_avg_sq"].item() == pytest.approx(root**2, rel=2e-3)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_rmsprop_of_torch_has_the_heavy_ball_s_edge(momentum: float) -> None:
    root = 3.0
    edge = root * momentum_threshold(LR, momentum)
    for factor, diverges in ((0.99, False), (1.01, True)):
        x = _unit()
        optimizer = torch.optim.RMSprop([x], lr=LR, alpha=1.0, eps=0.0, momentum=momentum)
        zero = torch.zeros_like(x.detach())
        optimizer.state[x] = {"step": torch.tensor(5.0), "square_avg": zero + root**2, "momentum_buffer": zero.clone()}
        assert _diverges(optimizer, x, edge * factor) is diverges


def test_the_textbook_values() -> None:
    assert momentum_threshold(0.1) == pytest.approx(20.0, rel=1e-15)
    assert momentum_threshold(0.1, 0.9) == pytest.approx(38.0, rel=1e-15)
    assert momentum_threshold(0.1, 0.9, nesterov=True) == pytest.approx(3.8 / 0.28, rel=1e-15)
    assert adaptive_threshold(0.1, 0.9) == pytest.approx(380.0, rel=1e-15)  # 38/η
    assert momentum_threshold(0.1, weight_decay=0.5) == pytest.approx(19.5, rel=1e-15)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.9, 0.99])
def test_plateaus_are_the_ends_of_stability_in_the_mean_square(beta: float, nesterov: bool) -> None:
    """At the first one curvature varies a lot around next to nothing, at the second it does not vary."""
    small, large = sharpness_plateaus(LR, beta, nesterov=nesterov)
    little = 1e-6 * small
    # The index is off by the drift, ηλ = 2(1 − β)·1e-6, times some 2β/(1 − β); the search for Nesterov's is off by a
    # rounding of 1e-15 over η²σ² = 4(1 − β)²·1e-6.
    assert mean_square_index(little, little * small, LR, beta, nesterov=nesterov) == pytest.approx(1.0, abs=1e-5)
    assert mean_square_index(large, 0.0, LR, beta, nesterov=nesterov) == pytest.approx(1.0, rel=1e-12)


def test_plateaus_without_momentum_and_with_dampening() -> None:
    assert sharpness_plateaus(LR) == sharpness_plateaus(LR, dampening=0.6) == (2.0 / LR, 2.0 / LR)
    # Dampened momentum is momentum with (1 − τ)η: two roundings.
    assert sharpness_plateaus(LR, 0.9, dampening=0.6) == pytest.approx(sharpness_plateaus(0.4 * LR, 0.9), rel=1e-15)
    assert sharpness_plateaus(0.0, 0.9) == (math.inf, math.inf)


def test_without_a_learning_rate_everything_is_stable() -> None:
    assert momentum_threshold(0.0, 0.9, weight_decay=1.0) == math.inf
    assert adaptive_threshold(0.0, 0.9, decoupled_weight_decay=1.0) == math.inf


def test_decay_that_is_unstable_by_itself_leaves_a_negative_threshold() -> None:
    assert momentum_threshold(0.5, weight_decay=6.0) == -2.0
    assert adaptive_threshold(0.5, decoupled_weight_decay=6.0) == -2.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: momentum_threshold(-0.1),
            r"lr must be finite and not negative, got -0.1: pass the learning rate of the step\.",
        ),
        (lambda: momentum_threshold(math.nan), r"lr must be finite and not negative, got nan"),
        (
            lambda: momentum_threshold(0.1, 1.0),
            r"momentum must lie in \[0, 1\), got 1.0: from 1 on no step is stable\.",
        ),
        (lambda: momentum_threshold(0.1, 0.9, dampening=1.0), r"dampening must be below 1, got 1.0: no gradient"),
        (lambda: momentum_threshold(0.1, 0.9, nesterov=True, dampening=0.1), r"dampening must be 0 with Nesterov"),
        (lambda: momentum_threshold(0.1, weight_decay=-1.0), r"weight_decay must be finite and not negative, got -1.0"),
        (lambda: sharpness_plateaus(-0.1), r"lr must be finite and not negative, got -0.1: pass the learning rate"),
        (lambda: sharpness_plateaus(0.1, 1.0), r"momentum must lie in \[0, 1\), got 1.0: from 1 on no step is stable"),
        (lambda: sharpness_plateaus(0.1, 0.9, nesterov=True, dampening=0.1), r"dampening must be 0 with Nesterov"),
        (lambda: adaptive_threshold(-0.1), r"lr must be finite and not negative"),
        (lambda: adaptive_threshold(0.1, 1.0), r"beta1 must lie in \[0, 1\), got 1.0"),
        (
            lambda: adaptive_threshold(0.1, decoupled_weight_decay=-1.0),
            r"decoupled_weight_decay must be finite and not negative",
        ),
        (lambda: adaptive_threshold(0.1, bias_correction=0.0), r"bias_correction must lie in \(0, 1\], got 0.0"),
        (lambda: adaptive_threshold(0.1, bias_correction=1.1), r"bias_correction must lie in \(0, 1\], got 1.1"),
    ],
)
def test_bad_settings_are_named(call: Callable[[], float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
