"""Computes the exact values in float64, without any code of the package."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from workloads import Batch, Workload, loss_of

Parameters = dict[str, Tensor]

# The line search of the package stops at a bracket of 1/16; the reference is to be exact beside that.
_BISECTIONS = 8


@dataclass
class Step:
    """One optimizer step as seen from outside.

    Attributes:
        before: θ_t by name.
        after: θ_{t+1} by name.
        batch: the batch that made the step.
        lr: η.
    """

    before: Parameters
    after: Parameters
    batch: Batch
    lr: float

    def same(self, other: Step) -> bool:
        """Whether both started from and led to the same parameters, bit for bit."""
        return all(
            torch.equal(mine[name], theirs[name])
            for mine, theirs in ((self.before, other.before), (self.after, other.after))
            for name in mine
        )


class Reference:
    """Exact forms along one step.

    Attributes:
        hessian: dᵀHd.
        gauss_newton: dᵀGd.
        descent: gᵀd.
    """

    def __init__(self, workload: Workload, step: Step) -> None:
        self.step = step
        x, y = step.batch
        self._batch = (x.double() if x.is_floating_point() else x, y)
        self._twin = workload.make().to(x.device).double()
        self._before = {name: p.double() for name, p in step.before.items()}
        self._direction = {name: p - step.after[name].double() for name, p in self._before.items()}
        with sdpa_kernel(SDPBackend.MATH):
            self.descent, self.hessian = self._double_backward()
            self.gauss_newton = self._product()

    def _double_backward(self) -> tuple[float, float]:
        self._set(0.0)
        parameters = dict(self._twin.named_parameters())
        directions = [self._direction[name] for name in parameters]
        gradients = torch.autograd.grad(loss_of(self._twin, self._batch), list(parameters.values()), create_graph=True)
        descent = torch.stack([(g * d).sum() for g, d in zip(gradients, directions, strict=True)]).sum()
        products = torch.autograd.grad(descent, list(parameters.values()))
        quadratic = torch.stack([(h * d).sum() for h, d in zip(products, directions, strict=True)]).sum()
        return float(descent), float(quadratic)

    @torch.no_grad()
    def _product(self) -> float:
        """Variance of u = J d under the softmax, mean over the positions."""
        logits, u = jvp(
            lambda p: functional_call(self._twin, p, (self._batch[0],)), (self._before,), (self._direction,)
        )
        p = logits.softmax(-1)
        centred = u - (p * u).sum(-1, keepdim=True)
        return float((p * centred.square()).sum(-1).mean())

    @torch.no_grad()
    def _set(self, position: float) -> None:
        for name, p in self._twin.named_parameters():
            p.copy_(self._before[name] - position * self._direction[name])

    @torch.no_grad()
    def critical_factor(self, near: float) -> float:
        """η_c/η by bisection between half and twice a value that is near it; NaN if it is not in between."""

        def increased(position: float) -> bool:
            self._set(position)
            return bool(loss_of(self._twin, self._batch) > base)

        self._set(0.0)
        base = loss_of(self._twin, self._batch)
        low, high = near / 2.0, near * 2.0
        if increased(low) or not increased(high):
            return float("nan")
        for _ in range(_BISECTIONS):
            middle = 0.5 * (low + high)
            low, high = (low, middle) if increased(middle) else (middle, high)
        return 0.5 * (low + high)

    def error(self, key: str, value: float) -> float:
        """Relative difference of a logged curvature from the exact value of what it estimates."""
        if key == "critical_sharpness":
            factor = 2.0 / (value * self.step.lr)
            return abs(self.critical_factor(factor) / factor - 1.0)
        exact = self.gauss_newton if key in ("lambda_kl", "lambda_gn") else self.hessian
        return abs(value * self.descent * self.step.lr / exact - 1.0)

    def quadratic_error(self, value: float) -> float:
        """Relative difference of a peer's dᵀHd."""
        return abs(value / self.hessian - 1.0)


class References:
    """References of one workload, each computed once.

    Runs with different monitors go through the same parameters bit for bit, so that one reference serves them all;
    that it is the same step is checked, not assumed.
    """

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self._known: dict[int, Reference] = {}

    def at(self, index: int, step: Step) -> Reference:
        """Reference of step ``index``."""
        known = self._known.get(index)
        if known is None or not known.step.same(step):
            known = self._known[index] = Reference(self._workload, step)
        return known
