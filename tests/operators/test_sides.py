"""Each kinked operation of torch: its sides, and its values and gradients on them, in float64."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

from lightning_curvature.operators.kinks import KINKS
from lightning_curvature.operators.sides import Frozen, Looking
from lightning_curvature.replay.frozen import sides_of
from tests.helpers.kinks import BY_HAND, OPERATIONS, UNKNOWN, along, evaluated, number


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name: str) -> None:
    loss, t = along(name), number(0.0).requires_grad_()
    value = loss(t)
    read = sides_of([value])
    looking = Looking()
    assert evaluated(looking, loss, 0.0) == float(value)
    assert read
    shown = [side for side in looking.sides if side.kink != "ne"]  # the hinge loss asks for the class of its targets
    assert [side.kink for side in read] == [side.kink for side in shown]
    assert all(torch.equal(a.number, b.number) for a, b in zip(read, shown, strict=True))
    (slope,) = torch.autograd.grad(value, t, create_graph=True)

    def second(step: float) -> float:
        ends = [Frozen(looking.sides) for _ in range(2)]
        losses = [evaluated(mode, loss, sign * step) for mode, sign in zip(ends, (1.0, -1.0), strict=True)]
        assert not any(mode.other for mode in ends)
        return (losses[0] - 2.0 * float(value) + losses[1]) / step**2

    # Sums in another order than the operation's own.
    assert evaluated(Frozen(looking.sides), loss, 0.0) == pytest.approx(float(value), rel=1e-13)
    # With Richardson's extrapolation truncation is h⁴ and rounding 16 u |L|/h²: 1e-8 and 1e-10 of a loss of 100.
    extrapolated = (4.0 * second(0.005) - second(0.01)) / 3.0
    if name not in UNKNOWN:
        exact = float(torch.autograd.grad(slope, t)[0])
        assert extrapolated == pytest.approx(exact, rel=1e-5, abs=1e-5 * abs(float(slope)))


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name: str) -> None:
    loss, t, looking = along(name), number(0.0).requires_grad_(), Looking()
    value = loss(t)
    evaluated(looking, loss, 0.0)
    (slope,) = torch.autograd.grad(value, t, create_graph=True)
    ends = {h: [evaluated(Frozen(looking.sides), loss, sign * h) for sign in (1.0, -1.0)] for h in (0.005, 0.01)}
    seconds = {h: (pair[0] - 2.0 * float(value) + pair[1]) / h**2 for h, pair in ends.items()}
    slopes = {h: (pair[0] - pair[1]) / (2.0 * h) for h, pair in ends.items()}
    # A target without gradient moves along: what is detached is another function elsewhere, kinks or not.
    if name != "straight through":
        assert (4.0 * slopes[0.005] - slopes[0.01]) / 3.0 == pytest.approx(float(slope), rel=1e-6)
        exact = float(torch.autograd.grad(slope, t)[0])
        assert (4.0 * seconds[0.005] - seconds[0.01]) / 3.0 == pytest.approx(exact, rel=1e-5, abs=1e-5)


# These have no kink of the gradient on this line: elsewhere only, or one of its slope, or a jump of the value alone.
STRAIGHT = {
    *("elu", "elu, in place", "celu", "smooth l1 loss", "huber loss", "clamp_min, by a tensor", "max", "min"),
    *("max_pool1d", "max_pool2d", "adaptive_max_pool1d", "adaptive_max_pool2d", "fractional_max_pool2d"),
    *("triplet loss", "hinge loss", "of a scalar", "mask", "mask, written to"),
}


@pytest.mark.parametrize("name", [name for name in OPERATIONS | BY_HAND if name not in UNKNOWN | {"straight through"}])
def test_gradients_stay_on_their_sides(name: str) -> None:
    """A difference of gradients is the second derivative of the sides at θ, as autograd has it."""
    loss, t, looking, h = along(name), number(0.0).requires_grad_(), Looking(), 0.01
    evaluated(looking, loss, 0.0)
    (slope,) = torch.autograd.grad(loss(t), t, create_graph=True)
    exact = float(torch.autograd.grad(slope, t)[0])

    def difference(differentiated: bool | None) -> float:
        slopes = []
        for sign in (1.0, -1.0):
            at = number(sign * h).requires_grad_()
            mode = None if differentiated is None else Frozen(looking.sides, differentiated=differentiated)
            with mode or contextlib.nullcontext():
                value = loss(at)
            assert mode is None or not mode.other
            slopes.append(float(torch.autograd.grad(value, at)[0]))
        return (slopes[0] - slopes[1]) / (2.0 * h)

    crossed, frozen = abs(difference(None) - exact), abs(difference(True) - exact)
    # An operand that comes back to its kink is off by up to h|x'|, which is h|x'|·|y''/y'| of the jump of its gradient:
    # a hundredth at h = 0.01 for terms w sin(x), and ten times as much for norms, whose slopes are sums.
    # Without kinks between, truncation is h² and where the slope bends h: up to 3 % of terms of the size of the slope.
    assert frozen <= crossed / 5.0 + 0.03 * (abs(exact) + abs(float(slope)))
    assert (crossed > 0.05 * (abs(exact) + abs(float(slope)))) == (name not in STRAIGHT)


def test_operands_that_no_kink_parts_stay_as_they_are() -> None:
    x = torch.tensor([-2.0, -1e-30, 0.0, 1e-30, 2.0])
    with Looking() as looking:
        torch.relu(x)
    with Frozen(looking.sides, differentiated=True):
        assert torch.equal(torch.relu(x), x.clamp_min(0.0))
    assert torch.equal(x, torch.tensor([-2.0, -1e-30, 0.0, 1e-30, 2.0]))


def test_an_operand_without_memory_of_its_own_is_left_alone() -> None:
    """One number stands for all: it cannot come back for each."""
    x = torch.tensor([-1.0])
    with Looking() as looking:
        torch.relu(x.expand(3))
    x.fill_(1.0)
    with Frozen(looking.sides, differentiated=True) as mode:
        assert torch.equal(torch.relu(x.expand(3)), torch.ones(3))
    assert mode.other


def test_every_kink_is_tried() -> None:
    tried = {side.kink for name in OPERATIONS for side in sides_of([along(name)(number(0.0).requires_grad_())]) or ()}
    # With the branch of one that is tried; or of a step, which no graph shows.
    twins = {"nanmedian", "mode", "cummin", "fmin", "adaptivemaxpool3d", "fractionalmaxpool3d"}
    steps = {name for name, kink in KINKS.items() if kink is KINKS["gt"]}
    assert set(KINKS) - tried == twins | steps


def test_bf16_stays_bf16() -> None:
    layer = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Hardtanh())
    x = torch.randn(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        read = sides_of([y.sum()])
        assert read is not None
        with torch.no_grad(), Frozen(read):
            again = layer(x)
    assert again.dtype == y.dtype == torch.bfloat16
    assert torch.equal(again, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_relu_on_a_side_is_a_choice_and_no_product(dtype: torch.dtype) -> None:
    """What is beyond the kink passes as it is, what is below is 0, an infinity or NaN too."""
    x = torch.tensor([1.0, -2.0, float("inf"), -float("inf"), float("nan"), 3.0, 0.0, -0.0], dtype=dtype)
    number = torch.tensor([True, True, True, False, False, False, False, True])
    assert torch.equal(KINKS["relu"].branch({"self": x}, number), torch.where(number, x, 0))
