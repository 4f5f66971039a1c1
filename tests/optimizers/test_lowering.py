"""After lowering, every schedule of torch is the scheduled learning rate times the factor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import Optimizer, swa_utils
from torch.optim import lr_scheduler as schedulers

from lightning_curvature.optimizers.lowering import lower_learning_rate

STEPS, AT, FACTOR = 40, 13, 0.3
# Some forty multiplications and cosines in float64, each to 1e-16; sums of terms that cancel by less than a thousand.
ROUNDING = 1e-12

MAKE: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda step: 1.0 / (1 + step)),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: schedulers.StepLR(o, 5),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [4, 17]),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, 0.1, 20),
    "LinearLR": lambda o: schedulers.LinearLR(o, 0.1, total_iters=30),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 35, 2.0),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 15, eta_min=0.01),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 7, 2, eta_min=0.01),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.1, 1.0, step_size_up=4, mode="triangular2"),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 2.0, total_steps=STEPS + 1),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, total_iters=20), schedulers.CosineAnnealingLR(o, 15, eta_min=0.01)], [20]
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ExponentialLR(o, 0.95), schedulers.StepLR(o, 9)], optimizer=o
    ),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=8, min_lr=0.02),
    "SWALR": lambda o: swa_utils.SWALR(o, 0.05, anneal_epochs=20),
}


def rates(name: str, factor: float | None) -> list[list[float]]:
    """Learning rates of two groups at each step."""
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2))], "lr": lr} for lr in (0.5, 0.2)]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    scheduler = MAKE[name](optimizer)
    found = []
    for step in range(STEPS):
        if step == AT and factor is not None:
            lower_learning_rate(optimizer, [scheduler], factor)
        found.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
    return found


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", MAKE)
def test_schedules_are_linear_in_what_is_lowered(name: str) -> None:
    plain, lowered = rates(name, None), rates(name, FACTOR)
    assert any(before != after for before, after in zip(plain[AT:], plain[AT + 1 :], strict=False))
    for step, (whole, part) in enumerate(zip(plain, lowered, strict=True)):
        factor = FACTOR if step >= AT else 1.0
        assert part == pytest.approx([factor * rate for rate in whole], rel=ROUNDING, abs=1e-15), step


def test_all_of_torchs_schedulers_are_tried() -> None:
    own = {
        name
        for name, one in vars(schedulers).items()
        if isinstance(one, type) and issubclass(one, schedulers.LRScheduler)
    }
    assert own - {"LRScheduler", "_LRScheduler"} | {"SWALR", "ReduceLROnPlateau"} == set(MAKE)


def test_a_tensor_stays_the_same_object() -> None:
    rate = torch.tensor(0.5)
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(2))], lr=rate)
    lower_learning_rate(optimizer, [], 0.5)
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == 0.25
