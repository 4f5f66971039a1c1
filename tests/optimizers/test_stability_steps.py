"""Preconditioner and threshold against the steps that torch.optim's optimizers really take."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, Adamax, AdamW, RMSprop

from lightning_curvature.optimizers.stability import preconditioner, stability_rule
from tests.helpers.optimizers import make_parameters, make_steps

U64 = 2.0**-53
Make = Callable[..., Any]
Groups = list[dict[str, Any]]


# ----------------------------------------------------------------------------------------------------------------------
# P and the last step: θ_{t+1} = θ_t − η P⁻¹ m


def _numerator(optimizer: Any, p: Tensor, theta: Tensor) -> Tensor:
    """What the step puts over P, times the learning rate that it used, from the state and the gradient."""
    group = next(g for g in optimizer.param_groups if any(p is q for q in g["params"]))
    state, lr = optimizer.state[p], float(group["lr"])
    if "exp_avg" in state:
        return lr * state["exp_avg"] / (1.0 - group["betas"][0] ** state["step"].item())
    g = p.grad + group["weight_decay"] * theta
    if isinstance(optimizer, Adagrad):
        return lr / (1.0 + (state["step"].item() - 1.0) * group["lr_decay"]) * g
    return lr * g


STEPS: dict[str, Make] = {
    "adam": lambda p: Adam(p, lr=0.1),
    "adam with a large eps": lambda p: Adam(p, lr=0.1, eps=0.3, betas=(0.8, 0.9)),
    "adam, decay in the gradient": lambda p: Adam(p, lr=0.1, weight_decay=0.3),
    "amsgrad": lambda p: Adam(p, lr=0.1, betas=(0.9, 0.5), amsgrad=True),
    "adam, single tensor": lambda p: Adam(p, lr=0.1, foreach=False),
    "adam, foreach": lambda p: Adam(p, lr=0.1, foreach=True),
    "adam, fused": lambda p: Adam(p, lr=0.1, fused=True),
    "adam, a tensor of a rate": lambda p: Adam(p, lr=torch.tensor(0.1, dtype=torch.float64)),
    "adam that climbs": lambda p: Adam(p, lr=0.1, maximize=True),
    "adamw": lambda p: AdamW(p, lr=0.1, weight_decay=0.3),
    "adamw, amsgrad, fused": lambda p: AdamW(p, lr=0.1, weight_decay=0.3, betas=(0.9, 0.5), amsgrad=True, fused=True),
    "adamax": lambda p: Adamax(p, lr=0.1, eps=0.01),
    "rmsprop": lambda p: RMSprop(p, lr=0.1),
    "rmsprop, centered": lambda p: RMSprop(p, lr=0.1, centered=True, alpha=0.8),
    "rmsprop, decay": lambda p: RMSprop(p, lr=0.1, weight_decay=0.3),
    "adagrad": lambda p: Adagrad(p, lr=0.1),
    "adagrad, all options": lambda p: Adagrad(p, lr=0.1, lr_decay=0.2, weight_decay=0.3, initial_accumulator_value=0.5),
    "adagrad, fused": lambda p: Adagrad(p, lr=0.1, fused=True),
    "sgd": lambda p: SGD(p, lr=0.1, weight_decay=0.3),
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("count", [1, 7])
def test_the_last_step_was_divided_by_it(name: str, count: int) -> None:
    parameters = make_parameters(6, 9)
    optimizer = STEPS[name](parameters)
    make_steps(optimizer, parameters, count - 1)
    thetas = [p.detach().clone() for p in parameters]
    make_steps(optimizer, parameters, 1)
    rule = stability_rule(optimizer)
    for p, theta, diagonal in zip(parameters, thetas, preconditioner(optimizer, parameters), strict=True):
        decay = rule.lr * 0.3 if isinstance(optimizer, AdamW) else 0.0
        step = _numerator(optimizer, p, theta) / diagonal
        # θ, its product with 1 − ηλ and the sum are rounded once each; the quotient's own few roundings are of the
        # size of the step, which is at most 0.1·√(1/0.2) of Adam's or 0.1·10³ of SGD's.
        bound = 4 * U64 * (theta.abs() + step.abs()).max().item() + 8 * U64 * step.abs().max().item()
        assert (theta * (1.0 - decay) - step - p.detach()).abs().max().item() <= bound


def test_rmsprop_s_momentum_sums_what_was_divided_by_it() -> None:
    (p,) = make_parameters(6)
    optimizer = RMSprop([p], lr=0.1, momentum=0.9, centered=True)
    make_steps(optimizer, [p], 4)
    before = optimizer.state[p]["momentum_buffer"].clone()
    make_steps(optimizer, [p], 1)
    (diagonal,) = preconditioner(optimizer, [p])
    added = optimizer.state[p]["momentum_buffer"] - 0.9 * before
    # The buffer is a sum of two numbers, the difference one more: three roundings of the buffer's size, times P.
    bound = 4 * U64 * (before.abs() + added.abs()) * diagonal + 8 * U64 * p.grad.abs()  # type: ignore[union-attr]
    assert ((added * diagonal - p.grad).abs() <= bound).all()


# ----------------------------------------------------------------------------------------------------------------------
# The threshold and P together: the optimizer's own step on ½ θᵀHθ, as a matrix


SIZE = 3
BUFFERS = ("momentum_buffer", "exp_avg")
# Small enough that the gradients' squares vanish beside the second moment: (10² · 1e-10)² against 1.
PROBE = 1e-10


def _transition(make: Make, groups: Groups, hessian: Tensor, steps: list[int]) -> tuple[Tensor, Any, list[Tensor]]:
    """The matrix of one real step on (θ, buffers), built column by column, with second moments of order one."""
    columns = []
    size = SIZE * len(groups)
    for index in range(2 * size):
        point = torch.zeros(2 * size, dtype=torch.float64)
        point[index] = PROBE
        parameters = make_parameters(*[SIZE] * len(groups))
        optimizer = make([{"params": [p], **options} for p, options in zip(parameters, groups, strict=True)])
        make_steps(optimizer, parameters, 1)  # makes the state
        names = {name for state in optimizer.state.values() for name in state if name in BUFFERS}
        with torch.no_grad():
            for k, p in enumerate(parameters):
                rows = slice(k * SIZE, (k + 1) * SIZE)
                p.copy_(point[:size][rows])
                for name, value in optimizer.state[p].items():
                    if name == "step":
                        value.fill_(steps[k] - 1)
                    elif name in BUFFERS:
                        value.copy_(point[size:][rows])
                    elif name == "grad_avg":
                        value.zero_()
                    elif value is not None:
                        value.copy_(torch.linspace(0.3, 2.0, SIZE) * (1 + k))
            theta = torch.cat([p.detach() for p in parameters])
            for p, gradient in zip(parameters, (hessian @ theta).split(SIZE), strict=True):
                p.grad = gradient.clone()
        optimizer.step()
        buffers = [optimizer.state[p].get(n) for p in parameters for n in names] or [0.0 * p for p in parameters]
        buffers = [0.0 * p if b is None else b for p, b in zip(parameters, buffers, strict=True)]
        columns.append(torch.cat([*(p.detach() for p in parameters), *buffers]).detach() / PROBE)
    return torch.stack(columns, dim=1), optimizer, parameters


LINEAR: dict[str, tuple[Make, Groups]] = {
    "sgd, rates": (SGD, [{"lr": 0.1}, {"lr": 0.3}]),
    "sgd, everything": (
        SGD,
        [
            {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.7},
            {"lr": 0.3, "momentum": 0.5, "nesterov": True},
        ],
    ),
    "adam": (Adam, [{"lr": 0.1}]),
    "adam, rates": (Adam, [{"lr": 0.1, "eps": 0.3}, {"lr": 0.02}]),
    "adamw, decay and none": (AdamW, [{"lr": 0.1, "weight_decay": 2.0}, {"lr": 0.1, "weight_decay": 0.0}]),
    "adamw, everything": (
        AdamW,
        [
            {"lr": 0.1, "weight_decay": 2.0, "betas": (0.5, 0.99)},
            {"lr": 0.3, "weight_decay": 0.5, "betas": (0.9, 0.9), "amsgrad": True},
        ],
    ),
    "adamax": (Adamax, [{"lr": 0.1}, {"lr": 0.3, "betas": (0.5, 0.9)}]),
    "rmsprop": (RMSprop, [{"lr": 0.1}, {"lr": 0.3}]),
    "rmsprop, momentum": (
        RMSprop,
        [{"lr": 0.1, "momentum": 0.9, "centered": True}, {"lr": 0.3, "momentum": 0.5}],
    ),
    "adagrad": (Adagrad, [{"lr": 0.1, "lr_decay": 0.5}, {"lr": 0.3}]),
}


@pytest.mark.parametrize("steps", [[3, 3], [4, 2]])
@pytest.mark.parametrize("name", LINEAR)
def test_a_real_step_turns_unstable_where_the_preconditioned_hessian_passes_the_threshold(
    name: str, steps: list[int]
) -> None:
    make, groups = LINEAR[name]
    size = SIZE * len(groups)
    root = torch.randn(size, size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    hessian = root @ root.T
    _, optimizer, parameters = _transition(make, groups, hessian, steps)
    rule = stability_rule(optimizer)
    scale = torch.cat(preconditioner(optimizer, parameters)).rsqrt()
    sharpness = torch.linalg.eigvalsh(scale[:, None] * hessian * scale)[-1]
    for off in (-1e-6, 1e-6):
        edge = hessian * (rule.preconditioned * (1.0 + off) / sharpness)
        matrix, _, _ = _transition(make, groups, edge, steps)
        radius = torch.linalg.eigvals(matrix).abs().max().item()
        # The dominant root moves by about as much as H does, the matrix is known to about 1e-12.
        assert (radius > 1.0) is (off > 0.0)
        assert radius == pytest.approx(1.0, abs=1e-4)
