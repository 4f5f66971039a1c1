"""A learning rate that is lowered for the rest of the run, under any scheduler of torch."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

# Every schedule of torch.optim.lr_scheduler is linear in these together: scaling all of them by one factor scales all
# later learning rates by it.
_OF_GROUP = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")
_OF_SCHEDULER = ("base_lrs", "max_lrs", "min_lrs", "default_min_lr", "eta_min", "_last_lr")


@torch.no_grad()
def lower_learning_rate(optimizer: Any, schedulers: Iterable[Any], factor: float) -> None:
    """Multiply the learning rates of an optimizer by a factor, now and in the rest of its schedules.

    Args:
        optimizer: a torch optimizer, bare or as Lightning wraps it; all its parameter groups are lowered.
        schedulers: those that move its learning rates. Of one that is not torch's the attributes of torch's count.
        factor: by which learning rates are multiplied.

    Example:
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=1.0)
        >>> scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        >>> lower_learning_rate(optimizer, [scheduler], 0.1)
        >>> optimizer.step(), scheduler.step()
        (None, None)
        >>> optimizer.param_groups[0]["lr"]
        0.05
    """
    for group in optimizer.param_groups:
        for key in _OF_GROUP:
            if key in group:
                group[key] = _scaled(group[key], factor)
    for scheduler in _single(schedulers):
        for name in _OF_SCHEDULER:
            if name in vars(scheduler):
                setattr(scheduler, name, _scaled(getattr(scheduler, name), factor))


def _single(schedulers: Iterable[Any]) -> Iterable[Any]:
    """Return schedulers with those that they are made of, each once."""
    found: dict[int, Any] = {}
    waiting = list(schedulers)
    while waiting:
        one = waiting.pop()
        if id(one) not in found:
            found[id(one)] = one
            waiting += vars(one).get("_schedulers", [])
    return found.values()


def _scaled(value: Any, factor: float) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_scaled(one, factor) for one in value)
    if isinstance(value, Tensor):
        return value.mul_(factor)  # a captured step reads this very tensor
    return value * factor if isinstance(value, (int, float)) else value
