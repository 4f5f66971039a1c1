"""Each kinked operation of torch: its sides off the graph and off a repetition, and its values on them, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_curvature.replay.frozen import Frozen, KinkedStep, Looking, Spoiled, sides_of
from lightning_curvature.replay.kinks import KINKS
from tests.helpers.once import Kinked

WEIGHT = torch.full((3,), 0.2, dtype=torch.float64)
LOW, HIGH = torch.linspace(-1.0, 0.0, 8, dtype=torch.float64), torch.linspace(0.5, 1.0, 8, dtype=torch.float64)

OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "relu, in place": lambda x: F.relu_(x * 1.0),
    "relu6": lambda x: F.relu6(8.0 * x),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.3),
    "leaky_relu, in place": lambda x: F.leaky_relu_(x * 1.0, 0.3),
    "prelu": lambda x: F.prelu(x, WEIGHT),
    "threshold": lambda x: F.threshold(x, 0.1, 0.2),
    "threshold, in place": lambda x: F.threshold_(x * 1.0, 0.1, 0.2),
    "elu": F.elu,
    "elu, in place": lambda x: F.elu_(x * 1.0),
    "selu": F.selu,
    "celu": lambda x: F.celu(x, 2.0),
    "hardtanh": F.hardtanh,
    "hardtanh, in place": lambda x: F.hardtanh_(x * 1.0),
    "hardsigmoid": lambda x: F.hardsigmoid(3.0 * x),
    "hardswish": lambda x: F.hardswish(3.0 * x),
    "hardshrink": F.hardshrink,
    "softshrink": F.softshrink,
    "clamp": lambda x: x.clamp(-0.5, 0.7),
    "clamp, from below": lambda x: x.clamp(min=0.0),
    "clamp, from above": lambda x: x.clamp(max=0.3),
    "clamp, by tensors": lambda x: x.clamp(LOW, HIGH),
    "clamp_min": lambda x: x.clamp_min(0.0),
    "clamp_min, in place": lambda x: (x * 1.0).clamp_min_(0.0),
    "clamp_min, by a tensor": lambda x: x.clamp_min(LOW),
    "clamp_max": lambda x: x.clamp_max(0.0),
    "abs": torch.abs,
    "abs, in place": lambda x: (x * 1.0).abs_(),
    "l1 loss": lambda x: F.l1_loss(x, torch.full_like(x.detach(), 0.1), reduction="none"),
    "maximum": lambda x: torch.maximum(x, 0.5 * x.roll(1, 0)),
    "minimum": lambda x: torch.minimum(x, 0.5 * x.roll(1, 0)),
    "fmax": lambda x: torch.fmax(x, 0.5 * x.roll(1, 0)),
    "max, along a dimension": lambda x: x.max(1).values,
    "max, kept": lambda x: x.max(-1, keepdim=True).values,
    "min, along a dimension": lambda x: x.min(1).values,
    "max": torch.max,
    "min": torch.min,
    "amax": lambda x: x.amax((2, 3)),
    "amax, kept": lambda x: x.amax(-1, keepdim=True),
    "amin": lambda x: x.amin(1),
    "median": torch.median,
    "median, along a dimension": lambda x: x.median(1).values,
    "kthvalue": lambda x: x.kthvalue(2).values,
    "sort": lambda x: x.sort(-1).values,
    "sort, stable": lambda x: x.sort(dim=1, stable=True, descending=True).values,
    "topk": lambda x: x.topk(2).values,
    "cummax": lambda x: x.cummax(1).values,
    "max_pool1d": lambda x: F.max_pool1d(x[0], 2),
    "max_pool2d": lambda x: F.max_pool2d(x, 2),
    "max_pool2d, overlapping": lambda x: F.max_pool2d(x, 3, stride=2, padding=1),
    "max_pool3d": lambda x: F.max_pool3d(x[None], 2),
    "adaptive_max_pool1d": lambda x: F.adaptive_max_pool1d(x[0], 2),
    "adaptive_max_pool2d": lambda x: F.adaptive_max_pool2d(x, 2),
    "fractional_max_pool2d": lambda x: F.fractional_max_pool2d(x, 2, output_size=4),
    "norm, 1": lambda x: x.norm(1),
    "norm, 1, along a dimension": lambda x: torch.linalg.vector_norm(x, 1, dim=1),
    "norm, infinite": lambda x: torch.linalg.vector_norm(x, math.inf, dim=(2, 3)),
    "normalize, 1": lambda x: F.normalize(x, p=1.0),
    "smooth l1 loss": lambda x: F.smooth_l1_loss(x, 0.3 * x.roll(1, 0), beta=0.5),
    "huber loss": lambda x: F.huber_loss(x, 0.3 * x.roll(1, 0), reduction="sum", delta=0.5),
    "triplet loss": lambda x: F.triplet_margin_loss(x, 0.5 * x, 0.2 * x),
    "hinge loss": lambda x: F.hinge_embedding_loss(x, -torch.ones_like(x), margin=0.2, reduction="none"),
    "scatter_reduce": lambda x: torch.zeros(2, 3, 8, 2, dtype=x.dtype).scatter_reduce(
        3, torch.arange(8).remainder(2).expand_as(x), x, "amax", include_self=False
    ),
    "scatter_reduce, of what is there": lambda x: torch.zeros(2, 3, 8, 2, dtype=x.dtype).scatter_reduce(
        3, torch.arange(8).remainder(2).expand_as(x), x, "amin"
    ),
    "of a scalar": lambda x: (x.sum() / 30.0).abs(),
}
# The second derivative of these is not there: it is that of the branch all the same.
UNKNOWN = {"hardsigmoid"}


def along(name: str) -> Callable[[Tensor], Tensor]:
    """A smooth loss of an operation, along a line."""
    g = torch.Generator().manual_seed(1)
    start, direction = (torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=g) for _ in range(2))

    def loss(t: Tensor) -> Tensor:
        torch.manual_seed(5)  # fractional pooling draws its regions
        y = OPERATIONS[name](start + t * direction)
        weight = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        return (weight * torch.sin(y)).sum()

    return loss


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def evaluated(mode: Any, loss: Callable[[Tensor], Tensor], t: float) -> float:
    with torch.no_grad(), mode:
        return float(loss(number(t)))


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name: str) -> None:
    loss, t = along(name), number(0.0).requires_grad_()
    value = loss(t)
    read = sides_of([value])
    looking = Looking(given=False)
    assert evaluated(looking, loss, 0.0) == float(value)
    assert read
    shown = [side for side in looking.sides if side.kink != "ne"]  # the hinge loss asks for the class of its targets
    assert [side.kink for side in read] == [side.kink for side in shown]
    assert all(torch.equal(a.number, b.number) for a, b in zip(read, shown, strict=True))
    (slope,) = torch.autograd.grad(value, t, create_graph=True)

    def second(step: float) -> float:
        ends = [Frozen(looking.sides, {}) for _ in range(2)]
        losses = [evaluated(mode, loss, sign * step) for mode, sign in zip(ends, (1.0, -1.0), strict=True)]
        assert not any(mode.other for mode in ends)
        return (losses[0] - 2.0 * float(value) + losses[1]) / step**2

    # Sums in another order than the operation's own.
    assert evaluated(Frozen(looking.sides, {}), loss, 0.0) == pytest.approx(float(value), rel=1e-13)
    # With Richardson's extrapolation truncation is h⁴ and rounding 16 u |L|/h²: 1e-8 and 1e-10 of a loss of 100.
    extrapolated = (4.0 * second(0.005) - second(0.01)) / 3.0
    if name not in UNKNOWN:
        exact = float(torch.autograd.grad(slope, t)[0])
        assert extrapolated == pytest.approx(exact, rel=1e-5, abs=1e-5 * abs(float(slope)))


# Of these the graph does not show the kinks; the second derivative is that of the branch, as autograd has it.
BY_HAND: dict[str, Callable[[Tensor], Tensor]] = {
    "where": lambda x: torch.where(x > 0.0, x, 0.1 * x),
    "mask": lambda x: x * (x >= 0.2),
    "mask, written to": lambda x: x * (x >= 0.2).logical_or_(x < -1.0),
    "indices, written to": lambda x: x.gather(1, x.max(1, keepdim=True).indices.add_(1).remainder_(3)),
    "masked_fill": lambda x: x.masked_fill(x < -0.1, 0.3),
    "argmax": lambda x: x.gather(1, x.argmax(1, keepdim=True)),
    "sign": lambda x: x * x.sign(),
    "straight through": lambda x: x + ((4.0 * x).round() / 4.0 - x).detach(),
    "floor": lambda x: x * x.floor(),
    "quantile": lambda x: x.flatten(1).quantile(0.3, dim=1),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPERATIONS, name, BY_HAND[name])
    loss, t, looking = along(name), number(0.0).requires_grad_(), Looking(given=False)
    value = loss(t)
    evaluated(looking, loss, 0.0)
    (slope,) = torch.autograd.grad(value, t, create_graph=True)
    ends = {h: [evaluated(Frozen(looking.sides, {}), loss, sign * h) for sign in (1.0, -1.0)] for h in (0.005, 0.01)}
    seconds = {h: (pair[0] - 2.0 * float(value) + pair[1]) / h**2 for h, pair in ends.items()}
    slopes = {h: (pair[0] - pair[1]) / (2.0 * h) for h, pair in ends.items()}
    # A target without gradient moves along: what is detached is another function elsewhere, kinks or not.
    if name != "straight through":
        assert (4.0 * slopes[0.005] - slopes[0.01]) / 3.0 == pytest.approx(float(slope), rel=1e-6)
        exact = float(torch.autograd.grad(slope, t)[0])
        assert (4.0 * seconds[0.005] - seconds[0.01]) / 3.0 == pytest.approx(exact, rel=1e-5, abs=1e-5)


def test_every_kink_is_tried() -> None:
    tried = {side.kink for name in OPERATIONS for side in sides_of([along(name)(number(0.0).requires_grad_())]) or ()}
    # With the branch of one that is tried; or of a step, which no graph shows.
    twins = {"nanmedian", "mode", "cummin", "fmin", "adaptivemaxpool3d", "fractionalmaxpool3d"}
    steps = {name for name, kink in KINKS.items() if kink is KINKS["gt"]}
    assert set(KINKS) - tried == twins | steps


def learned(step: Callable[[Tensor], Tensor]) -> tuple[KinkedStep, list[Any] | None, Looking]:
    kinked = KinkedStep()
    kinked.wanted = "frozen"
    read = kinked.read([step(number(0.3).requires_grad_())])
    looking = kinked.looking()
    assert looking is not None
    evaluated(looking, step, 0.3)
    kinked.learn(read, looking)
    if not looking.sides:
        kinked.leave()
    return kinked, read, looking


def test_an_open_graph() -> None:
    kinked, read, looking = learned(lambda t: torch.relu(t * torch.linspace(-1.0, 1.0, 5)).sum())
    assert read is not None
    assert len(read) == len(looking.sides) == 1
    assert not kinked.lost


def test_operations_on_data_are_left_alone() -> None:
    data = torch.linspace(-1.0, 1.0, 5, dtype=torch.float64)
    kinked, read, looking = learned(lambda t: torch.relu(t * data.clamp(-0.5, 0.5)).sum())
    assert read is not None
    assert (len(read), len(looking.sides)) == (1, 2)
    mode = kinked.compared(read)
    assert mode is not None
    evaluated(mode, lambda t: torch.relu(t * data.clamp(-0.5, 0.5)).sum(), -0.2)
    assert not mode.moved
    assert not kinked.lost


@pytest.mark.parametrize(
    "step",
    [
        lambda t: Kinked.apply(t * torch.linspace(-1.0, 1.0, 5)).sum(),
        lambda t: torch.relu(Kinked.apply(t * torch.linspace(-1.0, 1.0, 5)) - 0.1).sum(),
        lambda t: checkpoint(lambda x: torch.relu(x).sum(), t * torch.linspace(-1.0, 1.0, 5), use_reentrant=False),
        lambda t: checkpoint(lambda x: torch.relu(x).sum(), t * torch.linspace(-1.0, 1.0, 5), use_reentrant=True),
        lambda t: torch.quantile(t * torch.linspace(-1.0, 1.0, 5, dtype=torch.float64), 0.4),
        lambda t: torch.where(t * torch.linspace(-1.0, 1.0, 5) > 0.1, t, 0.1 * t).sum(),
    ],
    ids=[
        "custom function",
        "custom function beside another",
        "checkpoint",
        "reentrant checkpoint",
        "quantile",
        "where",
    ],
)
def test_graphs_that_do_not_show_all(step: Callable[[Tensor], Tensor]) -> None:
    """Found out at the latest by an evaluation elsewhere; then the sides come from a repetition."""
    kinked, read, looking = learned(step)
    if not kinked.lost:
        mode = kinked.compared(read)
        assert mode is not None
        evaluated(mode, step, 0.2)
        assert len(mode.moved) == 1
        assert evaluated(Spoiled(mode.moved), step, 0.3) != float(step(number(0.3)))
    kinked.repeated = True
    assert kinked.read([step(number(0.3).requires_grad_())]) is None
    mode = kinked.on_sides(looking.sides)
    assert mode is not None
    evaluated(mode, step, -0.3)
    kinked.settle(mode)


def test_reading_does_not_run_a_checkpoint_again() -> None:
    runs: list[int] = []

    def body(x: Tensor) -> Tensor:
        runs.append(1)
        return torch.relu(x).sum()

    loss = checkpoint(body, torch.linspace(-1.0, 1.0, 5, requires_grad=True), use_reentrant=False)
    assert sides_of([loss]) is None
    assert len(runs) == 1
    loss.backward()
    assert len(runs) == 2


@pytest.mark.parametrize("other", [lambda x: torch.sort(x).values, lambda x: torch.relu(x[:2]), lambda x: x])
def test_other_operations_are_no_values(other: Callable[[Tensor], Tensor]) -> None:
    line = torch.linspace(-1.0, 1.0, 5, dtype=torch.float64)
    kinked, read, _ = learned(lambda t: torch.relu(t * line).sum())
    mode = kinked.on_sides(read)
    assert mode is not None
    evaluated(mode, lambda t: other(t * line).sum(), 0.2)
    with pytest.raises(ValueError, match=r"must make the operations with kinks \(relu, max, clamp, …\) that it made"):
        kinked.settle(mode)
    assert kinked.lost
    assert not kinked.closed
    kinked.repeated = True
    with pytest.raises(ValueError, match="kinks='crossed'"):
        evaluated(mode, lambda t: other(t * line).sum(), 0.2)
        kinked.settle(mode)
    assert kinked.closed


def test_a_smooth_step_is_looked_at_once() -> None:
    kinked, read, _ = learned(lambda t: torch.tanh(t))
    assert read == []
    assert kinked.looking() is None
    assert kinked.on_sides(read) is None
    assert kinked.read([torch.relu(number(1.0).requires_grad_())]) == []


def test_bf16_stays_bf16() -> None:
    layer = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Hardtanh())
    x = torch.randn(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        read = sides_of([y.sum()])
        assert read is not None
        with torch.no_grad(), Frozen(read, {}):
            again = layer(x)
    assert again.dtype == y.dtype == torch.bfloat16
    assert torch.equal(again, y)
