"""Hessian and Gauss-Newton matrix of a network's loss in float64, formed row by row over a flat parameter vector."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tests.oracles.dense import Loss

Batches = Sequence[tuple[Any, Any]]


class Matrices:
    """Dense matrices of the mean loss over all samples of some batches.

    Args:
        network: its structure, mode, parameters and buffers are used, of a copy in float64. Tied weights are one
            parameter. Modules with an attribute ``fused`` get False: they are to spell their formula out.
        loss: mean loss of (outputs, targets).
    """

    def __init__(self, network: nn.Module, loss: Loss) -> None:
        self.network, self.loss = copy.deepcopy(network).double(), loss
        for module in self.network.modules():
            if hasattr(module, "fused"):
                module.fused = False  # type: ignore[assignment]
        trained = {name: p.detach() for name, p in self.network.named_parameters() if p.requires_grad}
        self.names, self.shapes = list(trained), [p.shape for p in trained.values()]
        self.theta = torch.cat([p.reshape(-1) for p in trained.values()])

    def outputs(self, flat: Tensor, x: Any) -> Tensor:
        """Outputs at other parameters; each call starts from the same buffers."""
        pieces = flat.split([shape.numel() for shape in self.shapes])
        values = {n: piece.reshape(s) for n, piece, s in zip(self.names, pieces, self.shapes, strict=True)}
        buffers = {name: b.clone() for name, b in self.network.named_buffers()}
        return functional_call(self.network, buffers | values, (double(x),))

    def gradient(self, batches: Batches) -> Tensor:
        """Gradient of the loss, (N,)."""
        return _mean(
            lambda x, y: torch.autograd.functional.jacobian(
                lambda flat: self.loss(self.outputs(flat, x), double(y)), self.theta
            ),
            batches,
        )

    def hessian(self, batches: Batches) -> Tensor:
        """Hessian of the loss, (N, N)."""
        return _mean(
            lambda x, y: torch.autograd.functional.hessian(
                lambda flat: self.loss(self.outputs(flat, x), double(y)), self.theta
            ),
            batches,
        )

    def gauss_newton(self, batches: Batches) -> Tensor:
        """J^T (Hessian of the loss by the outputs) J, (N, N)."""

        def of(x: Any, y: Any) -> Tensor:
            z = self.outputs(self.theta, x).detach()
            j = torch.autograd.functional.jacobian(lambda flat: self.outputs(flat, x), self.theta)
            j = j.reshape(-1, len(self.theta))
            inner = torch.autograd.functional.hessian(
                lambda flat: self.loss(flat.reshape(z.shape), double(y)), z.reshape(-1)
            )
            return j.T @ inner @ j

        return _mean(of, batches)

    def second_moment(self, groups: Sequence[Batches], lr: float) -> Tensor:
        """E_B[(I − ηH_B)²], each mini-batch, a group of batches, weighted by its samples."""
        total, identity = sum(samples(group) for group in groups), torch.eye(len(self.theta), dtype=torch.float64)
        steps = [identity - lr * self.hessian(group) for group in groups]
        return sum(
            (step @ step * (samples(group) / total) for step, group in zip(steps, groups, strict=True)),
            torch.zeros_like(identity),
        )


def samples(batches: Batches) -> int:
    """Number of samples in all."""
    return sum(len(y) for _, y in batches)


def double(value: Any) -> Any:
    """Float64 for what is a floating-point tensor."""
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _mean(of: Callable[[Any, Any], Tensor], batches: Batches) -> Tensor:
    return torch.stack([of(x, y) * (len(y) / samples(batches)) for x, y in batches]).sum(dim=0)
