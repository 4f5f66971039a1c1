"""Runs whose regimes are known: small networks on digits under full-batch training, and quadratics."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call

from lightning_curvature.functional import (
    REGIMES,
    adaptive_threshold,
    catapult_alarm,
    momentum_threshold,
    oscillation_cosine,
    regime,
)

SAMPLES, STEPS, AFTER, EVERY = 300, 600, 100, 10
NAN = math.nan


@dataclass(frozen=True)
class Setting:
    """A network on digits under full-batch training."""

    name: str
    optimizer: str
    lr: float
    width: int = 16
    depth: int = 1
    activation: Callable[[], nn.Module] = nn.Tanh
    tuned: bool = True


SETTINGS = (
    Setting("GD, tanh", "gd", 0.3),
    Setting("GD, two layers of GELU", "gd", 0.15, 24, 2, nn.GELU),
    Setting("heavy ball, tanh", "heavy ball", 0.16),
    Setting("Adam, tanh", "adam", 0.01),
    Setting("Adam, two layers of GELU", "adam", 0.005, 24, 2, nn.GELU),
    # None of these was looked at while limits were chosen.
    Setting("GD, ReLU", "gd", 0.2, 32, 1, nn.ReLU, tuned=False),
    Setting("heavy ball, two layers of SiLU", "heavy ball", 0.2, 24, 2, nn.SiLU, tuned=False),
    Setting("Adam, ReLU", "adam", 0.008, 32, 1, nn.ReLU, tuned=False),
)


@dataclass
class Series:
    """What is logged of a run, one row a step."""

    loss: list[float] = field(default_factory=list)
    sharpness: list[float] = field(default_factory=list)
    ratio: list[float] = field(default_factory=list)
    cosine: list[float] = field(default_factory=list)
    growth: list[float] = field(default_factory=list)

    def tensor(self, name: str) -> Tensor:
        """Return a column."""
        return torch.tensor(getattr(self, name), dtype=torch.float64)

    def regimes(self) -> list[str]:
        """Return the regime of each step."""
        known = {"edge_ratio": self.tensor("ratio"), "sharpness": self.tensor("sharpness")}
        return [REGIMES[int(i)] for i in regime(self.tensor("loss"), cosine=self.tensor("cosine"), **known)]

    def alarms(self, rule: str = "default") -> list[bool]:
        """Return the alarm of each step; by "three steps": cosine below −0.9 and growth above 1 in three steps."""
        cosine, growth = self.tensor("cosine"), self.tensor("growth")
        if rule == "default":
            return catapult_alarm(self.tensor("loss"), cosine=cosine, growth=growth).tolist()
        holds = ((cosine < -0.9) & (growth > 1.0)).tolist()
        return [i >= 2 and all(holds[i - 2 : i + 1]) for i in range(len(holds))]

    def doubles(self, step: int) -> bool:
        """Whether the loss is twice the least of the twenty before, or not finite."""
        return not self.loss[step] < 2.0 * min(self.loss[max(0, step - 20) : step], default=math.inf)


def train(setting: Setting, seed: int, steps: int, changes: Mapping[int, float] | None = None) -> Series:
    """Train in float64, and multiply the learning rate by a factor before each step of ``changes``."""
    digits, generator = load_digits(), torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(digits.data), generator=generator)[:SAMPLES]
    x = torch.tensor(digits.data)[chosen] / 16.0
    y = F.one_hot(torch.tensor(digits.target)[chosen], 10).double()
    torch.manual_seed(seed)
    sizes = [64, *[setting.width] * setting.depth]
    layers = [one for pair in itertools.pairwise(sizes) for one in (nn.Linear(*pair), setting.activation())]
    net = nn.Sequential(*layers, nn.Linear(setting.width, 10)).double()
    parameters = list(net.parameters())
    names = [name for name, _ in net.named_parameters()]

    def loss_at(flat: Tensor) -> Tensor:
        parts = flat.split([p.numel() for p in parameters])
        own = {name: part.view_as(p) for name, part, p in zip(names, parts, parameters, strict=True)}
        return 0.5 * (functional_call(net, own, (x,)) - y).square().sum(1).mean()

    theta = nn.utils.parameters_to_vector(parameters).detach().requires_grad_()
    optimizer: torch.optim.Optimizer = (
        torch.optim.Adam([theta], lr=setting.lr)
        if setting.optimizer == "adam"
        else torch.optim.SGD([theta], lr=setting.lr, momentum=0.9 * (setting.optimizer == "heavy ball"))
    )
    found, follow = Series(), Oscillation()
    vector = torch.randn(theta.shape, generator=generator, dtype=torch.float64)
    for step in range(steps):
        group = optimizer.param_groups[0]
        group["lr"] *= (changes or {}).get(step, 1.0)
        diagonal = _preconditioner(optimizer, theta)
        loss = loss_at(theta)
        found.loss.append(loss.item())
        sharpness = NAN
        if step % EVERY == 0 and diagonal is not None and math.isfinite(loss.item()):
            sharpness, vector = _lambda_max(loss_at, theta, diagonal, vector)
        found.sharpness.append(sharpness)
        found.ratio.append(sharpness / _threshold(group))
        optimizer.zero_grad()
        loss.backward()
        before = theta.detach().clone()
        optimizer.step()
        cosine, growth = follow.add(before - theta.detach(), diagonal)
        found.cosine.append(cosine)
        found.growth.append(growth)
        if not found.loss[-1] < 1e8:
            break
    return found


class Oscillation:
    """Cosine and growth of second differences of steps."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def add(self, step: Tensor, diagonal: Tensor | None) -> tuple[float, float]:
        """Add d_t; return the cosine and the growth, NaN before the fourth step."""
        self.steps = [*self.steps[-3:], step]
        if len(self.steps) < 4 or diagonal is None:
            return NAN, NAN
        a, b, c, d = self.steps
        now, last = d - 2.0 * c + b, c - 2.0 * b + a
        product, square, square_before = (
            (p * diagonal * q).sum().item() for p, q in ((now, last), (now, now), (last, last))
        )
        growth = math.sqrt(square / square_before) if square_before else NAN
        return oscillation_cosine(product, square, square_before), growth


def _preconditioner(optimizer: torch.optim.Optimizer, theta: Tensor) -> Tensor | None:
    """Return the diagonal of the last step; None before the first step of Adam."""
    if isinstance(optimizer, torch.optim.SGD):
        return torch.ones_like(theta)
    state, group = optimizer.state[theta], optimizer.param_groups[0]
    if not state:
        return None
    return (state["exp_avg_sq"] / (1.0 - group["betas"][1] ** float(state["step"]))).sqrt() + group["eps"]


def _threshold(group: dict[str, Any]) -> float:
    if "betas" in group:
        return adaptive_threshold(group["lr"], group["betas"][0])
    return momentum_threshold(group["lr"], group["momentum"])


def _lambda_max(
    loss_at: Callable[[Tensor], Tensor], theta: Tensor, diagonal: Tensor, vector: Tensor
) -> tuple[float, Tensor]:
    """Return λ_max(P^{-1/2}HP^{-1/2}) and its vector, by ten power iterations from the last vector, shifted."""
    (gradient,) = torch.autograd.grad(loss_at(theta), theta, create_graph=True)
    root, value = diagonal.rsqrt(), 0.0
    for _ in range(10):
        vector = vector / vector.norm()
        (product,) = torch.autograd.grad(gradient, theta, root * vector, retain_graph=True)
        product = root * product
        value = float(vector @ product)
        vector = product + 0.3 * abs(value) * vector
    return value, vector


def quadratic(seed: int, kind: str) -> tuple[Series, list[str | None]]:
    """Steps of gradient descent on a quadratic of twenty dimensions, with or without noise, and their regimes."""
    g = torch.Generator().manual_seed(seed)
    a = torch.rand(20, generator=g, dtype=torch.float64) + 0.01
    a /= a.max()
    low, high = {"noise": (0.2, 0.8), "stable": (0.1, 0.85), "unstable": (1.02, 1.5)}[kind]
    ratio = low + (high - low) * torch.rand((), generator=g, dtype=torch.float64).item()
    x = torch.randn(20, generator=g, dtype=torch.float64)
    found, follow, truth = Series(), Oscillation(), list[str | None]()
    for step in range(300):
        excess = 0.5 * (a * x * x).sum().item()
        noise = torch.randn(20, generator=g, dtype=torch.float64) * (kind == "noise")
        d = 2.0 * ratio * (a * x + 0.3 * noise)
        x = x - d
        cosine, growth = follow.add(d, torch.ones_like(d))
        row = (1.0 + excess, 1.0, ratio, cosine, growth)
        for name, value in zip(("loss", "sharpness", "ratio", "cosine", "growth"), row, strict=True):
            getattr(found, name).append(value if step % EVERY == 0 or name not in ("sharpness", "ratio") else NAN)
        if kind == "noise":
            truth.append("noise-driven oscillation" if step >= 100 else None)
        elif kind == "stable":
            # Within a window of twenty the loss still falls by more than 1 %, or by less than 0.01 %.
            truth.append("descent" if excess > 1e-2 else "flat" if max(found.loss[-20:]) < 1.0 + 1e-4 else None)
        else:
            truth.append("diverging" if found.loss[-1] > 10.0 * min(found.loss) else "edge of stability")
    return found, [None] * 20 + truth[20:]


def known_regimes(run: Series) -> list[str | None]:
    """Return the regimes of a run of a network, from all its steps, those that come later too; None at transitions."""
    loss, count = run.loss, len(run.loss)
    measured = [step for step in range(count) if not math.isnan(run.ratio[step])]

    def around(column: list[float], step: int) -> list[float]:
        place = bisect.bisect(measured, step)
        return [column[one] for one in measured[max(0, place - 3) : place + 2]]

    truth: list[str | None] = []
    for step in range(count):
        ratios, values = around(run.ratio, step), around(run.sharpness, step)
        if step < 30 or len(values) < 5:
            truth.append(None)
        elif median(ratios) >= 0.97:
            truth.append("edge of stability")
        elif median(ratios) <= 0.9 and max(ratios) < 0.95:
            rises = values[-1] > 1.01 * values[0] and values == sorted(values)
            falls = values[-1] < values[0] and loss[min(step + 10, count - 1)] < loss[max(0, step - 10)]
            truth.append("progressive sharpening" if rises else "descent" if falls else None)
        else:
            truth.append(None)
    step = 30
    while step < count:
        if not run.doubles(step):
            step += 1
            continue
        base = min(loss[step - 20 : step])
        end = next((later for later in range(step, count) if loss[later] < 1.5 * base), count)
        lost = end == count and (len(loss) < STEPS and not loss[-1] < 1e8)
        if end < count or lost:  # of the others nobody knows how they end
            truth[step:end] = ["diverging" if lost else "catapult"] * (end - step)
        else:
            truth[step:end] = [None] * (end - step)
        step = end
    return truth
