"""Steps that differentiate for themselves (force fields, gradient penalties, inner steps): all monitors have values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_curvature import (
    BatchSharpnessMonitor,
    DirectionalCurvatureMonitor,
    HessianSpectrumMonitor,
    NoiseCovarianceMonitor,
    StabilizationMonitor,
)
from tests.helpers.runs import Capture, loader, make_trainer
from tests.oracles.along_step import DIFFERENCE, EXACT

RATE, SCALES = 0.02, (1.0, 0.9, 0.8)
X = torch.rand(16, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = X.square().sum(1, keepdim=True).sin()


class Module(pl.LightningModule):
    """A small field of two variables."""

    def __init__(self, step: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.step(self, *batch)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=RATE)


def force_field(m: Any, x: Tensor, y: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    energy = m(x)
    (slope,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
    return (energy - y).square().mean() + (1.0 - slope).square().mean()


def gradient_penalty(m: Any, x: Tensor, y: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    score = m(x)
    (slope,) = torch.autograd.grad(score.sum(), x, create_graph=True)
    return 10.0 * (slope.norm(dim=1) - 1.0).square().mean() - score.mean()


def heat_equation(m: Any, x: Tensor, y: Tensor) -> Tensor:
    """Second derivatives by the inputs: four by all in dᵀHd."""
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(m(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first[:, 0].sum(), x, create_graph=True)
    return (first[:, 1] - 0.1 * second[:, 0]).square().mean() + (m(x) - y).square().mean()


def inner_step(m: Any, x: Tensor, y: Tensor) -> Tensor:
    """A step of the weights inside the step (MAML)."""
    weights, half = dict(m.network.named_parameters()), len(x) // 2
    inner = (torch.func.functional_call(m.network, weights, (x[:half],)) - y[:half]).square().mean()
    slopes = torch.autograd.grad(inner, list(weights.values()), create_graph=True)
    moved = {name: w - 0.1 * slope for (name, w), slope in zip(weights.items(), slopes, strict=True)}
    return (torch.func.functional_call(m.network, moved, (x[half:],)) - y[half:]).square().mean()


STEPS = {
    "force field": force_field,
    "gradient penalty": gradient_penalty,
    "heat equation": heat_equation,
    "inner step": inner_step,
}


class Weights(pl.Callback):
    """Parameters before each step, and at the end."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.found.append(nn.utils.parameters_to_vector(pl_module.parameters()).detach().clone())

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.on_train_batch_start(trainer, pl_module)


def fit(step: Any, *monitors: pl.Callback) -> tuple[Module, list[Tensor], dict[int, dict[str, float]]]:
    module, weights, capture = Module(step), Weights(), Capture()
    make_trainer(weights, *monitors, logger=capture).fit(module, loader([(scale * X, Y) for scale in SCALES]))
    return module, weights.found, capture.rows


def derivatives(module: Module, theta: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient and Hessian of the step at θ, dense."""
    parameters = list(module.parameters())
    with torch.no_grad():
        nn.utils.vector_to_parameters(theta.clone(), parameters)
    slopes = torch.autograd.grad(module.step(module, x, Y), parameters, create_graph=True, materialize_grads=True)
    g = torch.cat([slope.reshape(-1) for slope in slopes])
    rows = []
    for one in g:
        if one.grad_fn is None:
            rows.append(torch.zeros_like(theta))
            continue
        row = torch.autograd.grad(one, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([part.reshape(-1) for part in row]))
    return g.detach(), torch.stack(rows)


@pytest.mark.filterwarnings("ignore::lightning_curvature.CurvatureWarning")
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.slow
def test_values_are_those_of_the_step(name: str) -> None:
    step = STEPS[name]
    every: dict[str, Any] = {"every_n_train_steps": 1, "on_error": "raise"}
    along = DirectionalCurvatureMonitor(estimators=("hvp", "finite_difference", "critical"), **every)
    exact = HessianSpectrumMonitor(tolerance=1e-9, max_products=200, prefix="exact", **every)
    moved = HessianSpectrumMonitor(products="difference", tolerance=1e-4, max_products=200, prefix="moved", **every)
    _, weights, rows = fit(step, along, exact, moved)
    plain, unwatched, _ = fit(step)
    assert all(torch.equal(a, b) for a, b in zip(weights, unwatched, strict=True))
    for index, scale in enumerate(SCALES):
        d, row = weights[index] - weights[index + 1], rows[index]
        g, h = derivatives(plain, weights[index], scale * X)
        value = float(d @ h @ d / (g @ d)) / RATE
        assert row["curvature/lambda_dir"] == pytest.approx(value, rel=EXACT)
        assert row["curvature/lambda_fd"] == pytest.approx(value, rel=DIFFERENCE)
        assert row["curvature/critical_sharpness"] > 0.0
        hessian = torch.stack([derivatives(plain, weights[index], one * X)[1] for one in SCALES]).mean(0)
        largest = float(torch.linalg.eigvalsh(hessian)[-1])
        # Residuals of 1e-9 and 1e-4; the differences' own error is of the size of their residual.
        assert row["exact/lambda_max"] == pytest.approx(largest, rel=1e-8)
        assert row["moved/lambda_max"] == pytest.approx(largest, rel=1e-3)


@pytest.mark.filterwarnings("ignore::lightning_curvature.CurvatureWarning")
@pytest.mark.parametrize("name", ["force field", "gradient penalty"])
@pytest.mark.thinned(2)
def test_all_monitors(name: str) -> None:
    probe = DataLoader(TensorDataset(X, Y), batch_size=8)
    options: dict[str, Any] = {"on_error": "raise"}
    late: dict[str, Any] = {"at_steps": (1,), "at_end": False, "probe_dataloader": probe} | options
    monitors = [
        BatchSharpnessMonitor(every_n_train_steps=1, num_batches=4, min_batches=4, prefix="b", **options),
        StabilizationMonitor(sample_sizes=(2,), **late),
        NoiseCovarianceMonitor(parameter="network.0.weight", prefix="n", **late),
    ]
    _, weights, rows = fit(STEPS[name], *monitors)
    _, unwatched, _ = fit(STEPS[name])
    assert all(torch.equal(a, b) for a, b in zip(weights, unwatched, strict=True))
    found = {key: value for row in rows.values() for key, value in row.items()}
    assert all(abs(found[key]) > 0.0 for key in ("b/batch_sharpness", "curvature/delta_1", "n/noise_gamma"))
