"""Every estimator against the dense oracle for every kind of optimizer, with the update taken from the run."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.runs import Classifier, MakeOptimizer, Outcome, classification, mlp, run
from tests.oracles.along_step import check, monitors, rows_of


class Lion(torch.optim.Optimizer):
    """Sign of a moving average with decoupled weight decay (Chen et al. 2023): no optimizer of torch's own."""

    def __init__(self, params: Iterable[Tensor], lr: float) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99), "weight_decay": 0.1})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        for group in self.param_groups:
            first, second = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                direction = (first * average + (1.0 - first) * p.grad).sign()
                p.mul_(1.0 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=group["lr"])
                average.lerp_(p.grad, 1.0 - second)
        return result


class Duck:
    """What Lightning asks of an optimizer and no more: not a subclass of torch's. It normalizes the gradient."""

    def __init__(self, params: Iterable[Tensor], lr: float) -> None:
        self.param_groups: list[dict[str, Any]] = [{"params": list(params), "lr": lr}]
        self.defaults: dict[str, Any] = {"lr": lr}
        self.state: defaultdict[Tensor, Any] = defaultdict(dict)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad / p.grad.norm(), alpha=group["lr"])
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p in itertools.chain.from_iterable(group["params"] for group in self.param_groups):
            p.grad = None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


OPTIMIZERS: dict[str, MakeOptimizer] = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.3),
    "heavy_ball": lambda m: torch.optim.SGD(m.parameters(), lr=0.3, momentum=0.9),
    "nesterov": lambda m: torch.optim.SGD(m.parameters(), lr=0.3, momentum=0.9, nesterov=True),
    "adam": lambda m: torch.optim.Adam(m.parameters(), lr=0.05),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=0.05, weight_decay=0.5),
    "rmsprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=0.02, momentum=0.5),
    # With a line search: after a clipped gradient LBFGS takes the loss for flat and a free step goes astray.
    "lbfgs": lambda m: torch.optim.LBFGS(m.parameters(), max_iter=3, line_search_fn="strong_wolfe"),
    "lion": lambda m: Lion(m.parameters(), lr=0.05),
    "duck": lambda m: Duck(m.parameters(), lr=0.1),
}
# The gradients of these nets have norms of 0.2 to 1 and entries up to 0.3: both thresholds cut.
CLIPS: dict[str, dict[str, Any]] = {
    "free": {},
    "norm": {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "norm"},
    "value": {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"},
}


def fit(make: MakeOptimizer, batches: int = 3, **options: Any) -> Outcome:
    return run(Classifier(mlp(4, 6, 3), make), classification(batches), *monitors(), **options)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.thinned(10)
def test_optimizers_with_and_without_clipping(name: str, clip: str) -> None:
    check(fit(OPTIMIZERS[name], **CLIPS[clip]), steps=3)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.thinned(3)
def test_windows_of_three_batches_and_a_ragged_last_one(name: str) -> None:
    outcome = fit(OPTIMIZERS[name], batches=4, accumulate_grad_batches=3, **CLIPS["norm"])
    assert [len(step.parts) for step in outcome.steps] == [3, 1]
    check(outcome, steps=2)


def test_clipping_shortens_the_update_and_not_the_gradient() -> None:
    """With SGD Δθ is the clipped gradient: ‖Δθ‖ is the threshold, gᵀΔθ = threshold · ‖g‖ of the whole gradient."""
    free, clipped = (rows_of(fit(OPTIMIZERS["sgd"], batches=1, **CLIPS[clip]), "pair")[0] for clip in ("free", "norm"))
    # torch divides by ‖g‖ + 1e-6, so the clipped norm is the threshold to 1e-6/‖g‖, ‖g‖ > 0.2.
    assert clipped["update_norm"] == pytest.approx(0.1, rel=1e-5)
    assert clipped["descent"] == pytest.approx(0.1 * free["update_norm"], rel=1e-5)
