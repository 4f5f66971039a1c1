"""The stability index against dense Hessians of the halves, and against the exact edge in the mean square."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from lightning_curvature import StabilityMonitor
from lightning_curvature.functional import mean_square_index
from lightning_curvature.stability.result import StabilityResult, Terms
from tests.helpers.runs import Classifier, classification, make_trainer, mlp, rows, run
from tests.oracles.dense import Part

DECAY = 0.6
# Products and their squares are sums of some hundred terms in float64, of which the variance is a small difference.
EXACT = 1e-9
Loss = Callable[[Tensor, Tensor], Tensor]


def monitor(**options: Any) -> StabilityMonitor:
    return StabilityMonitor(**({"every_n_train_steps": 1, "decay": DECAY, "on_error": "raise"} | options))


def flat(values: dict[str, Tensor]) -> Tensor:
    return nn.utils.parameters_to_vector(list(values.values()))


def hessian(module: Classifier, before: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    def loss(vector: Tensor) -> Tensor:
        pieces = vector.split([p.numel() for p in before.values()])
        values = {n: q.reshape(p.shape) for (n, p), q in zip(before.items(), pieces, strict=True)}
        return module.loss(torch.func.functional_call(module.network, values, (x,)), y)

    return torch.autograd.functional.hessian(loss, flat(before))


def halves(parts: Sequence[Part]) -> list[tuple[float, list[tuple[Tensor, Tensor]]]]:
    """Shares of both halves with their batches: of whole batches, or of the one that there is."""
    if len(parts) > 1:
        first = len(parts) // 2
        pairs = [(part.x, part.y) for part in parts]
        return [(first / len(parts), pairs[:first]), (1.0 - first / len(parts), pairs[first:])]
    (part,) = parts
    cut = len(part.x) // 2
    return [
        (cut / len(part.x), [(part.x[:cut], part.y[:cut])]),
        (1.0 - cut / len(part.x), [(part.x[cut:], part.y[cut:])]),
    ]


def second_moment(gradients: Sequence[Tensor], beta: float) -> Tensor:
    v = torch.zeros_like(gradients[0])
    for g in gradients:
        v = beta * v + (1.0 - beta) * g**2
    return v


def sgd_like(momentum: float, threshold: float) -> Callable[[Sequence[Tensor]], tuple[Tensor, float]]:
    return lambda gradients: (torch.full_like(gradients[0], 1.0 / threshold), (1.0 + momentum) / (1.0 - momentum))


def adam_like(gradients: Sequence[Tensor]) -> tuple[Tensor, float]:
    t = len(gradients)
    p = (second_moment(gradients, 0.99) / (1.0 - 0.99**t)).sqrt() + 1e-8
    return (1.0 / (p * 6.0 * (1.0 - 0.5**t) / 0.05)), 3.0


# Optimizers, and 1/(TP) of each coordinate with (1 + β)/(1 − β) from all gradients before the step.
OPTIMIZERS: dict[str, tuple[Any, Callable[[Sequence[Tensor]], tuple[Tensor, float]]]] = {
    "gradient descent": (lambda p: torch.optim.SGD(p, lr=0.3), sgd_like(0.0, 2.0 / 0.3)),
    "heavy ball": (lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9), sgd_like(0.9, 3.8 / 0.3)),
    "dampened": (lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.5, dampening=0.2), sgd_like(0.5, 3.0 / 0.8 / 0.3)),
    "Adam": (lambda p: torch.optim.Adam(p, lr=0.05, betas=(0.5, 0.99)), adam_like),
    "RMSprop": (
        lambda p: torch.optim.RMSprop(p, lr=0.02, alpha=0.9),
        lambda g: (0.01 / (second_moment(g, 0.9).sqrt() + 1e-8), 1.0),
    ),
}
LOSSES: dict[str, Loss] = {"mean": F.cross_entropy, "sum": lambda z, y: F.cross_entropy(z, y, reduction="sum") / 9.0}


@pytest.mark.parametrize(
    ("name", "accumulate", "loss"),
    [*((name, 1, "mean") for name in OPTIMIZERS), ("heavy ball", 2, "mean"), ("Adam", 3, "mean"), ("Adam", 1, "sum")],
)
def test_terms_are_those_of_dense_hessians(name: str, accumulate: int, loss: str) -> None:
    make, scale_of = OPTIMIZERS[name]
    module, follow = Classifier(mlp(4, 6, 3), lambda m: make(m.parameters()), LOSSES[loss]), monitor()
    outcome = run(module, classification(12 * accumulate, 9), follow, accumulate_grad_batches=accumulate)
    assert follow.result is not None
    found, steps = list(follow.result.steps), outcome.steps
    assert len(found) == len(steps) - 2 == 10  # an average over 1/(1 − β) = 2.5 steps takes two
    average, gradients, expected = torch.zeros(()), list[Tensor](), list[Terms]()
    for t, step in enumerate(steps):
        theta = flat(step.before)
        if t >= 2:
            x = theta - average
            scale, ratio = scale_of(gradients)
            (w1, one), (w2, two) = halves(step.parts)
            factor = 2.0 if loss == "sum" else 1.0
            h1, h2 = (
                factor * torch.stack([hessian(module, step.before, *batch) for batch in half]).mean(0) @ x
                for half in (one, two)
            )
            # Twelve steps an epoch.
            m, v = w1 * h1 + w2 * h2, 11.0 / 12.0 * w1 * w2 * (h1 - h2) ** 2
            expected.append(
                Terms(
                    float((scale * (m**2 - v)).sum()),
                    ratio * float((scale * v).sum()),
                    float((scale * v).sum()),
                    float(x @ m),
                )
            )
        weights = torch.tensor([DECAY**k for k in range(t, -1, -1)], dtype=torch.float64)
        path = torch.stack([flat(one.before) for one in steps[: t + 1]])
        average = weights @ path / weights.sum()
        gradients.append(sum_of_gradients(module, step))
    for one, other in zip(found, expected, strict=True):
        size = abs(other.drift) + other.variance
        assert one.drift == pytest.approx(other.drift, rel=0.0, abs=EXACT * size)
        assert one.noise == pytest.approx(other.noise, rel=EXACT)
        assert one.variance == pytest.approx(other.variance, rel=EXACT)
        assert one.form == pytest.approx(other.form, rel=EXACT)
    row = rows(outcome.capture)[len(steps) - 1]
    form = math.fsum(one.form for one in expected)
    drift, noise = (math.fsum(getattr(one, part) for one in expected) / form for part in ("drift", "noise"))
    if form > 0.0:
        assert row["stability_index"] == pytest.approx(drift + noise, rel=EXACT)
        assert row["stability_index_drift"] == pytest.approx(drift, rel=EXACT)
        assert row["stability_index_noise"] == pytest.approx(noise, rel=EXACT)
    assert row["stability_index_steps"] == 10.0


def second_moments(x: Tensor, size: int, lr: float, momentum: float) -> float:
    """Spectral radius of the exact recursion of the second moments, of (θ, b) on the losses of size out of all rows."""
    count, d = x.shape
    single = 2.0 * x[:, :, None] * x[:, None, :]
    mean, eye = single.mean(0), torch.eye(d, dtype=x.dtype)
    products = torch.einsum("nij,nkl->ikjl", single, single).reshape(d * d, d * d) / count
    spread = (products - torch.kron(mean, mean)) / size * (count - size) / (count - 1)
    top = torch.cat([eye - lr * mean, -lr * momentum * eye], 1)
    step = torch.cat([top, torch.cat([mean, momentum * eye], 1)])
    left, right = torch.cat([-lr * eye, eye]), torch.cat([eye, torch.zeros_like(eye)], 1)
    moved = torch.kron(step, step) + torch.kron(left, left) @ spread @ torch.kron(right, right)
    return float(torch.linalg.eigvals(moved).abs().max())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("size", [4, 32])
def test_linear_regression_has_its_distance_from_the_exact_edge(momentum: float, size: int) -> None:
    """At a share of the learning rate at which second moments diverge, the index is about that share."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(256, 6, generator=g, dtype=torch.float64) * torch.linspace(0.3, 1.5, 6, dtype=torch.float64)
    y = torch.randn(256, 1, generator=g, dtype=torch.float64)
    low, high = 0.0, 8.0
    for _ in range(30):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if second_moments(x, size, middle, momentum) < 1.0 else (low, middle)
    for share in (0.4, 0.9):
        network = nn.Linear(6, 1, bias=False).double()
        lr = share * low
        module = Classifier(network, lambda m, lr=lr: torch.optim.SGD(m.parameters(), lr, momentum), F.mse_loss)
        follow = StabilityMonitor(every_n_train_steps=5, window=100)
        data = DataLoader(TensorDataset(x, y), size, sampler=RandomSampler(x, generator=g), drop_last=True)
        make_trainer(follow, max_epochs=-1, max_steps=800).fit(module, data)
        assert follow.result is not None
        values = follow.result.values()
        # The displacement lies along all directions, not along the least stable one alone: up to a quarter below. The
        # error is that of the noise.
        assert 0.75 * share - 2.0 * values["stability_index_stderr"] < values["stability_index"]
        assert values["stability_index"] < 1.15 * share + 2.0 * values["stability_index_stderr"]
        assert values["stability_index_stderr"] < 0.25


def rows_of(count: int, form: float = 1.0) -> list[Terms]:
    return [Terms(0.1 + 0.01 * k, 0.3 + 0.02 * k, 0.02, form) for k in range(count)]


def test_the_error_is_that_of_the_jackknife() -> None:
    steps = rows_of(9)
    values = StabilityResult(steps).values()
    ratios = torch.tensor([(one.drift + one.noise) / one.form for one in steps], dtype=torch.float64)
    # Of a mean, since all denominators are 1: the jackknife's error is the standard error.
    assert values["stability_index"] == pytest.approx(float(ratios.mean()), rel=1e-12)
    assert values["stability_index_stderr"] == pytest.approx(float(ratios.std() / 3.0), rel=1e-9)


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        (rows_of(7), "it takes 8 measured steps, and there are 7"),
        (rows_of(8, form=-1.0), "the curvature along the displacement is not positive in the mean"),
    ],
)
def test_it_says_why_there_is_no_index(steps: list[Terms], reason: str) -> None:
    result = StabilityResult(steps)
    assert math.isnan(result.values()["stability_index"])
    assert set(result.reasons.values()) == {reason}
    assert result.reasons.keys() == {key for key, value in result.values().items() if math.isnan(value)}


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_nesterov_is_at_its_edge_where_second_moments_are(momentum: float, share: float) -> None:
    """The variance at which the 3 × 3 recursion of second moments has the eigenvalue 1, and the index made of it."""
    unit = (2.0 + 2.0 * momentum) / (1.0 + 2.0 * momentum)
    a, beta = share * unit, momentum

    def radius(variance: float) -> float:
        def step(h: float) -> Tensor:
            return torch.tensor([[1.0 - h - beta * h, -beta * beta], [h, beta]], dtype=torch.float64)

        noise = step(1.0) - step(0.0)
        moved = torch.kron(step(a), step(a)) + variance * torch.kron(noise, noise)
        return float(torch.linalg.eigvals(moved).abs().max())

    low, high = 0.0, 8.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if radius(middle) < 1.0 else (low, middle)
    # The eigenvalue is 1 to some roundings, and with β = 0.99 its slope by the variance is a hundredth.
    assert mean_square_index(a, low, 1.0, beta, nesterov=True) == pytest.approx(1.0, rel=1e-9)
    # Of measured terms: drift is a/(Tη) in units of xᵀm, the variance (low/a)/(Tη).
    terms = [Terms(a / unit, 0.0, low / a / unit, 1.0)] * 8
    assert StabilityResult(terms, nesterov=beta).values()["stability_index"] == pytest.approx(1.0, rel=1e-9)


def sum_of_gradients(module: Classifier, step: Any) -> Tensor:
    """The gradient that the optimizer saw."""

    def loss(vector: Tensor, x: Tensor, y: Tensor) -> Tensor:
        pieces = vector.split([p.numel() for p in step.before.values()])
        values = {n: q.reshape(p.shape) for (n, p), q in zip(step.before.items(), pieces, strict=True)}
        return module.loss(torch.func.functional_call(module.network, values, (x,)), y)

    before = flat(step.before)
    parts = [torch.autograd.functional.jacobian(lambda v, p=p: loss(v, p.x, p.y), before) for p in step.parts]
    return torch.stack(parts).mean(0)
