"""Optimizers whose steps are tried, and what a trial may leave behind."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_curvature.distributed.shards import local
from lightning_curvature.linalg import VectorSpace
from lightning_curvature.optimizers.trial_steps import TrialSteps

Make = Callable[[Any], Any]


class Plain(Optimizer):
    """One that a test completes."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    def trained(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"] if p.grad is not None]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.trained():
            p.sub_(p.grad, alpha=self.param_groups[0]["lr"])


class Hoarder(Plain):
    """Keeps parameters, momentum, a count, random numbers and a method of its own in attributes; decays all it holds.

    Its momentum is one flat tensor with a view for each parameter; it replaces the data of its parameters, and notes
    its steps on them.
    """

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr)
        self.everything = [p for group in self.param_groups for p in group["params"]]
        self.flat = torch.zeros(sum(p.numel() for p in self.everything))
        sizes = [p.numel() for p in self.everything]
        self.momenta = [m.view(p.shape) for m, p in zip(self.flat.split(sizes), self.everything, strict=True)]
        self.count, self.generator, self.scale = 0, torch.Generator().manual_seed(5), self._scale
        self.lists: dict[str, list[int]] = {"counts": []}

    def _scale(self) -> float:
        return 1.0 / (1 + self.count)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.count += 1
        self.lists["counts"].append(self.count)
        self.flat.mul_(0.9)
        for p, momentum in zip(self.everything, self.momenta, strict=True):
            p.mul_(0.99)
            if p.grad is not None:
                momentum.add_(p.grad)
                own = torch.rand(p.shape, generator=self.generator)
                vars(p).setdefault("steps", []).append(self.count)
                noise = own + torch.rand(p.shape) + random.random() + len(p.steps)  # type: ignore[attr-defined]
                p.data = p.data - self.param_groups[0]["lr"] * self.scale() * momentum * noise
                p.grad.zero_()


class Lookahead(Optimizer):
    """Steps another optimizer, with which it shares groups and state, and every second time goes halfway back."""

    def __init__(self, inner: Optimizer) -> None:
        self.inner, self.count = inner, 0
        self.param_groups, self.defaults = inner.param_groups, inner.defaults
        self.slow = [p.detach().clone() for group in self.param_groups for p in group["params"]]
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = {}, {}

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.inner.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.inner.step()
        self.count += 1
        if self.count % 2 == 0:
            for p, slow in zip((p for g in self.param_groups for p in g["params"]), self.slow, strict=True):
                p.copy_(slow.lerp_(p, 0.5))


class Run:
    """Parameters, an optimizer with two groups, steps made with gradients that follow from the seed."""

    def __init__(self, make: Make, count: int, dtype: torch.dtype = torch.float32) -> None:
        self._random = torch.Generator().manual_seed(0)
        # Matrices, as Muon takes nothing else. One is laid out by columns; one is frozen; one has no gradient.
        shapes = ((4, 3), (3, 5), (2, 2), (3, 3), (6, 2))
        self.all = [nn.Parameter(self._draw(shape).to(dtype)) for shape in shapes]
        self.all[1].data = self.all[1].data.t().contiguous().t()
        self.all[2].requires_grad_(False)
        self.parameters = [self.all[4], self.all[0], self.all[1]]
        torch.manual_seed(7)
        random.seed(7)
        self.optimizer = make([{"params": self.all[:3]}, {"params": self.all[3:], "lr": 0.05}])
        for _ in range(count):
            self.step([self._draw(p.shape) for p in self.parameters])

    def _draw(self, shape: Any) -> Tensor:
        return torch.randn(shape, generator=self._random)

    def step(self, gradients: list[Tensor]) -> None:
        for p, gradient in zip(self.parameters, gradients, strict=True):
            p.grad = torch.empty_like(p).copy_(gradient)
        self.optimizer.step()

    def gradient(self, seed: int, scale: float = 1.0) -> Tensor:
        size = sum(p.numel() for p in self.parameters)
        return scale * torch.randn(size, generator=torch.Generator().manual_seed(seed))

    def real_update(self, gradient: Tensor) -> Tensor:
        """What the step makes of the parameters, really made."""
        space = VectorSpace(self.parameters)
        before = space.pack(self.parameters)
        self.step(space.views(gradient))
        return before - space.pack(self.parameters)


def _fingerprint(value: Any, seen: dict[int, Any]) -> Any:
    """Everything that can be told of an object and of what it holds: identity, content, memory, version."""
    if id(value) in seen or isinstance(value, type):
        return id(value)
    seen[id(value)] = value
    if isinstance(value, Tensor):
        own = (id(value), value._version, value.data_ptr(), value.dtype, value.requires_grad)
        return own, value.detach().tolist(), _fingerprint(value.grad, seen), _fingerprint(vars(value), seen)
    if isinstance(value, torch.Generator):
        return id(value), value.get_state().tolist()
    if isinstance(value, dict):
        return id(value), type(value), [(_fingerprint(k, seen), _fingerprint(v, seen)) for k, v in value.items()]
    if isinstance(value, (list, tuple)):
        return id(value), [_fingerprint(one, seen) for one in value]
    if isinstance(value, Optimizer):
        return id(value), _fingerprint(vars(value), seen)
    return value if isinstance(value, (int, float, str, type(None))) else id(value)


def fingerprint(run: Run) -> Any:
    seen: dict[int, Any] = {}
    return (
        _fingerprint(run.all, seen),
        _fingerprint(run.optimizer, seen),
        random.getstate(),
        torch.get_rng_state().tolist(),
    )


class Foretelling(pl.Callback):
    """Asks for the update with the gradient of each step, looks at what the step made, and asks for another."""

    def __init__(self) -> None:
        self.foretold: list[Tensor] = []
        self.made: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.space = VectorSpace([local(p) for p in self.parameters])
        gradient = self.space.pack([local(p.grad) for p in self.parameters])
        self.trials = TrialSteps(trainer, optimizer, self.parameters)
        marks = self.marks()
        self.foretold.append(self.trials.update_for(gradient))
        assert self.marks() == marks
        self.before = self.space.pack([local(p) for p in self.parameters])

    def marks(self) -> list[Any]:
        """Identity, memory and versions of parameters, of their shards and of their gradients."""
        tensors = [one for p in self.parameters for one in (p, local(p), p.grad, local(p.grad))]
        places = [local(one).data_ptr() for one in tensors]
        return [*places, *(one._version for one in tensors), *(id(p.grad) for p in self.parameters)]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.made.append(self.before - self.space.pack([local(p) for p in self.parameters]))
        self.trials.update_for(-3.0 * self.before)
