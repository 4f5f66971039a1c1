"""Dense curvature matrices of a run in float64, at the very steps that a monitor of the spectrum reports."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.func import functional_call

from tests.oracles.dense import Loss

# Products in float64 sum some hundred numbers with roundings of 1e-16 of the matrix's size each, so do the dense ones.
ROUNDING = 1e-13


@dataclass
class Moment:
    """What step t finds: θ_t and buffers of ``module.network``, η, and the optimizer's state."""

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    state: dict[str, dict[str, Any]]
    lr: float = 0.0


class Moments(pl.Callback):
    """Notes the moment of each optimizer step, numbered in order. Must stand before the monitor."""

    def __init__(self, index: int = 0) -> None:
        self.index, self.all = index, list[Moment]()
        self._open = False

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self._open:
            return
        self._open = True
        network, optimizer = pl_module.network, trainer.optimizers[self.index]
        parameters = {name: p.detach().clone() for name, p in network.named_parameters()}
        buffers = {name: b.clone() for name, b in network.named_buffers()}
        state = {n: copy.deepcopy(dict(optimizer.state.get(p, {}))) for n, p in network.named_parameters()}
        self.all.append(Moment(parameters, buffers, state))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if self._open and optimizer is trainer.optimizers[self.index]:
            # The gradient that moves the parameters is one at the noted θ_t, and the step will use this η.
            self._open, self.all[-1].lr = False, optimizer.param_groups[0]["lr"]
            for name, p in pl_module.network.named_parameters():
                noted = self.all[-1].parameters[name]
                assert self.index or torch.allclose(p, noted, rtol=0.0, atol=0.0, equal_nan=True)  # bit for bit


@dataclass
class Part:
    """A micro-batch; where the network draws random numbers, the state of torch's generator before its forward."""

    x: Any
    y: Any
    rng: Tensor | None = None

    @property
    def size(self) -> int:
        return len(self.y)


class Curvature:
    """Matrices of one moment, each the mean over parts weighted by their sizes.

    Args:
        network: only its structure is used.
        loss: mean loss of (outputs, targets).
        moment: θ_t and buffers.
        names: parameters that are differentiated, in the order of rows; default: those that require gradients.
        training: mode of the network.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: Loss,
        moment: Moment,
        names: Sequence[str] | None = None,
        training: bool = True,
    ) -> None:
        self.names = list(names or [n for n, p in network.named_parameters() if p.requires_grad])
        self.network, self.loss = copy.deepcopy(network).double().train(training), loss
        self.fixed = {name: _double(value) for name, value in (moment.parameters | moment.buffers).items()}
        self.shapes = [self.fixed[name].shape for name in self.names]
        self.theta = torch.cat([self.fixed[name].reshape(-1) for name in self.names])

    def outputs(self, flat: Tensor, part: Part) -> Tensor:
        pieces = flat.split([shape.numel() for shape in self.shapes])
        values = {n: piece.reshape(s) for n, piece, s in zip(self.names, pieces, self.shapes, strict=True)}
        if part.rng is not None:
            torch.set_rng_state(part.rng)
        fixed = {name: value.clone() for name, value in self.fixed.items()}
        return functional_call(self.network, fixed | values, (_double(part.x),))

    def hessian(self, parts: Sequence[Part]) -> Tensor:
        def of(part: Part) -> Tensor:
            return torch.autograd.functional.hessian(
                lambda flat: self.loss(self.outputs(flat, part), _double(part.y)), self.theta
            )

        return _mean(of, parts)

    def gauss_newton(self, parts: Sequence[Part]) -> Tensor:
        def of(part: Part) -> Tensor:
            z = self.outputs(self.theta, part).detach()
            j = torch.autograd.functional.jacobian(lambda flat: self.outputs(flat, part), self.theta)
            j = j.reshape(-1, len(self.theta))
            inner = torch.autograd.functional.hessian(
                lambda flat: self.loss(flat.reshape(z.shape), _double(part.y)), z.reshape(-1)
            )
            return j.T @ inner @ j

        return _mean(of, parts)

    def contraction(self, groups: Sequence[Sequence[Part]], lr: float) -> Tensor:
        """E_B[(I − ηH_B)²], each mini-batch weighted by its size."""
        total, identity = sum(part.size for group in groups for part in group), torch.eye(len(self.theta)).double()
        matrix = torch.zeros_like(identity)
        for group in groups:
            step = identity - lr * self.hessian(group)
            matrix += step @ step * (sum(part.size for part in group) / total)
        return matrix

    def preconditioned(self, matrix: Tensor, diagonal: dict[str, Tensor]) -> Tensor:
        """P^{-1/2} A P^{-1/2}."""
        scale = torch.cat([diagonal[name].double().reshape(-1) for name in self.names]).rsqrt()
        return scale[:, None] * matrix * scale


def check_eigenvalue(row: dict[str, float], key: str, matrix: Tensor, place: int, tolerance: float) -> None:
    """Compare a converged eigenvalue, its place counted from the largest or, if negative, from the smallest."""
    spectrum = torch.linalg.eigvalsh(matrix).flip(0)
    truth, value, error = float(spectrum[place]), row[key], row[f"{key}_error"]
    assert row[f"{key}_converged"] == 1.0
    bound, rounding = error * abs(value), ROUNDING * float(spectrum.abs().max())
    # The noise of the products is in the error, too. An eigenvalue of 0 has no relative one.
    assert bound <= max(tolerance * abs(value) * (1.0 + 1e-6), rounding)
    assert abs(value - truth) <= bound + rounding, (key, value, truth)


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _mean(of: Callable[[Part], Tensor], parts: Sequence[Part]) -> Tensor:
    total = sum(part.size for part in parts)
    kept = torch.get_rng_state()
    matrices = [of(part) * (part.size / total) for part in parts]
    torch.set_rng_state(kept)
    return torch.stack(matrices).sum(dim=0)
