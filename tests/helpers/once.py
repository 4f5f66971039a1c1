"""Functions that autograd does not see into; torch takes a backward that is differentiable once for a constant."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class OnceSquare(torch.autograd.Function):
    """x²."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2.0 * x * gradient


class Square(nn.Module):
    """x², with a second derivative or without."""

    def __init__(self, once: bool = True) -> None:
        super().__init__()
        self.once = once

    def forward(self, x: Tensor) -> Tensor:
        return OnceSquare.apply(x) if self.once else x * x


class OnceSum(torch.autograd.Function):
    """Mean square, as a loss that is written by hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square().mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2.0 * x / x.numel() * gradient


class Kinked(torch.autograd.Function):
    """A ReLU that autograd does not see into."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp_min(0.0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * (ctx.saved_tensors[0] > 0)
