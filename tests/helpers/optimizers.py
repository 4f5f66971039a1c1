"""Parameters and gradients of optimizers that step without a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def make_parameters(*sizes: int, dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(size, generator=g, dtype=torch.float64).to(dtype)) for size in sizes]


def make_steps(optimizer: Any, parameters: list[nn.Parameter], count: int) -> None:
    """Steps with gradients that vary from step to step and over three orders of magnitude."""
    g = torch.Generator().manual_seed(1)
    for _ in range(count):
        for p in parameters:
            scale = torch.logspace(-2, 1, p.numel(), dtype=torch.float64)
            p.grad = (torch.randn(p.shape, generator=g, dtype=torch.float64) * scale).to(p.dtype)
        optimizer.step()
