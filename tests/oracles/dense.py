"""Curvature along a step from the dense Hessian and the dense Gauss-Newton matrix, in float64."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Reference:
    """Second-order quantities of one step: gᵀd, dᵀHd, dᵀGd, all of the loss of the whole window."""

    descent: float
    hessian: float
    gauss_newton: float


@dataclass
class Part:
    """One batch of the window: its data and the states its forward started from."""

    x: Tensor
    y: Tensor
    rng: Tensor
    buffers: dict[str, Tensor]


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _outputs(network: nn.Module, values: dict[str, Tensor], part: Part) -> Tensor:
    """Outputs for one batch at given parameters, from the buffers and the random state its forward started from."""
    buffers = {name: _double(b).clone() for name, b in part.buffers.items()}
    torch.set_rng_state(part.rng)
    return functional_call(network, values | buffers, (_double(part.x),))


def reference(
    network: nn.Module,
    loss: Loss,
    parts: list[Part],
    before: dict[str, Tensor],
    after: dict[str, Tensor],
    gauss_newton: bool = True,
) -> Reference:
    """Evaluate the definitions at ``before`` along d = before − after, one dense matrix a batch.

    Args:
        network: maps x to outputs; only its structure is used.
        loss: of outputs and targets, the mean over the batch.
        parts: the batches whose mean loss made the step.
        before: parameters θ_t by name.
        after: parameters θ_{t+1} by name.
        gauss_newton: whether dᵀGd is wanted.
    """
    network = copy.deepcopy(network).double()
    names = [name for name, _ in network.named_parameters()]  # tied weights appear once
    sizes = [before[name].numel() for name in names]
    theta = torch.cat([before[name].double().reshape(-1) for name in names])
    d = theta - torch.cat([after[name].double().reshape(-1) for name in names])

    def outputs_at(flat: Tensor, part: Part) -> Tensor:
        pieces = flat.split(sizes)
        values = {n: piece.reshape(before[n].shape) for n, piece in zip(names, pieces, strict=True)}
        return _outputs(network, values, part)

    descent = hessian = curvature = 0.0
    for part in parts:
        y = _double(part.y)

        def loss_at(flat: Tensor, part: Part = part, y: Tensor = y) -> Tensor:
            return loss(outputs_at(flat, part), y)

        g = torch.autograd.functional.jacobian(loss_at, theta)
        h = torch.autograd.functional.hessian(loss_at, theta)
        descent += float(g @ d) / len(parts)
        hessian += float(d @ h @ d) / len(parts)
        if gauss_newton:
            z = outputs_at(theta, part).detach()
            j = torch.autograd.functional.jacobian(lambda flat, part=part: outputs_at(flat, part), theta)
            j = j.reshape(-1, theta.numel())
            inner = torch.autograd.functional.hessian(
                lambda flat, z=z, y=y: loss(flat.reshape(z.shape), y), z.reshape(-1)
            )
            curvature += float(d @ (j.T @ inner @ j) @ d) / len(parts)
    return Reference(descent, hessian, curvature)


@torch.no_grad()
def loss_along(
    network: nn.Module,
    loss: Loss,
    parts: list[Part],
    before: dict[str, Tensor],
    after: dict[str, Tensor],
    factor: float,
) -> float:
    """Mean loss of the window at θ_t − factor·d; arguments as in :func:`reference`."""
    network = copy.deepcopy(network).double()
    values = {name: b.double() + factor * (after[name].double() - b.double()) for name, b in before.items()}
    total = 0.0
    for part in parts:
        total += float(loss(_outputs(network, values, part), _double(part.y))) / len(parts)
    return total
