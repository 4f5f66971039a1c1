"""Kinked operations of torch, each as a smooth function of a line but for its kinks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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


def along(name: str) -> Callable[[Tensor], Tensor]:
    """A smooth loss of an operation, along a line."""
    g = torch.Generator().manual_seed(1)
    start, direction = (torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=g) for _ in range(2))

    def loss(t: Tensor) -> Tensor:
        torch.manual_seed(5)  # fractional pooling draws its regions
        y = (OPERATIONS | BY_HAND)[name](start + t * direction)
        weight = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        return (weight * torch.sin(y)).sum()

    return loss


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def evaluated(mode: Any, loss: Callable[[Tensor], Tensor], t: float) -> float:
    with torch.no_grad(), mode:
        return float(loss(number(t)))
