"""Batches of unequal size, and the dense Hessian of their mean."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.runs import Batch, classification


def ragged() -> list[Batch]:
    first, second = classification(2)
    return [first, (second[0][:3], second[1][:3])]


def dense(network: nn.Module, batches: list[Batch], gauss_newton: bool = False) -> Tensor:
    """Matrix of the mean loss over all samples, from torch's own dense second derivatives."""
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    shapes = [p.shape for p in network.parameters()]
    names = [name for name, _ in network.named_parameters()]
    theta = torch.cat([p.detach().flatten() for p in network.parameters()])

    def outputs(flat: Tensor) -> Tensor:
        parts = flat.split([s.numel() for s in shapes])
        values = {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}
        return torch.func.functional_call(network, values, (x,))

    if not gauss_newton:
        return torch.autograd.functional.hessian(lambda t: F.cross_entropy(outputs(t), y), theta)
    jacobian = torch.autograd.functional.jacobian(outputs, theta).flatten(0, 1)
    z = outputs(theta)
    curved = torch.autograd.functional.hessian(lambda v: F.cross_entropy(v.view_as(z), y), z.flatten())
    return jacobian.T @ curved @ jacobian
