"""How a step is evaluated on the sides of its kinks: what its graph shows of them, and what a repetition does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_curvature.operators.sides import Looking
from lightning_curvature.replay.frozen import KinkedStep, Spoiled, sides_of
from tests.helpers.kinks import evaluated, number
from tests.helpers.once import Kinked


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
