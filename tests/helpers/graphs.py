"""A layer whose graphs can be counted."""

from __future__ import annotations

import weakref
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class Token:
    """Lives as long as the node that holds it."""


class Marked(torch.autograd.Function):
    """The identity; its node holds a token."""

    tokens: ClassVar[list[weakref.ref[Token]]] = []

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.token = Token()
        Marked.tokens.append(weakref.ref(ctx.token))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.clone()


class Mark(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Marked.apply(x)


def alive() -> int:
    return sum(token() is not None for token in Marked.tokens)
