"""Every number of HessianSpectrumMonitor, at every measured step, against the dense matrices at θ_t in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, StepLR
from torch.utils.data import DataLoader, TensorDataset

from lightning_curvature import HessianSpectrumMonitor
from tests.helpers.runs import Capture, Classifier, make_trainer, mlp, rows
from tests.helpers.spectrum import BATCH, SAMPLES, TOLERANCE, monitor, samples, whole
from tests.oracles.hessian_spectrum import ROUNDING, Curvature, Moment, Moments, Part, check_eigenvalue

MEASURED = range(0, 4, 2)


def fit(module: Any, *monitors: HessianSpectrumMonitor, index: int = 0, **options: Any) -> tuple[Capture, list[Moment]]:
    capture, moments = Capture(), Moments(index)
    data = DataLoader(TensorDataset(*samples()), batch_size=BATCH, shuffle=True)
    trainer = make_trainer(moments, *monitors, logger=capture, **options)
    trainer.fit(module, data)
    return capture, moments.all


def test_spectrum_of_the_hessian() -> None:
    module = Classifier(mlp(4, 6, 3), lambda m: torch.optim.SGD(m.parameters(), lr=0.3))
    capture, moments = fit(module, monitor("lambda_max", "lambda_min", "hessian_trace", k=5))
    found = rows(capture)
    assert list(found) == list(MEASURED)
    for step, row in found.items():
        matrix = Curvature(module.network, module.loss, moments[step]).hessian(whole())
        for place, key in enumerate(["lambda_max", "lambda_2", "lambda_3", "lambda_4", "lambda_5"]):
            check_eigenvalue(row, key, matrix, place, TOLERANCE)
        check_eigenvalue(row, "lambda_min", matrix, -1, TOLERANCE)
        trace = float(matrix.trace())
        assert 0.0 <= row["hessian_trace_stderr"] <= 0.05 * row["hessian_trace"]  # as asked for by default
        # Exact where samples would take more products than the rest of the basis: rounding of some hundred operations.
        assert abs(row["hessian_trace"] - trace) <= 3.0 * row["hessian_trace_stderr"] + 1e-13 * trace
        assert row["lambda_max_threshold"] == 2.0 / 0.3
    # A value of a step before or after would not have passed.
    values = [row["lambda_max"] for row in found.values()]
    assert min(abs(a - b) for a, b in itertools.pairwise(values)) > 1e-3


def test_trace_is_exact_where_all_is_deflated() -> None:
    """Ten products of the sketch, and the eigenvector found before, span the space of ten parameters."""
    network = nn.Sequential(nn.Linear(4, 2), nn.Tanh()).double()
    module = Classifier(network, lambda m: torch.optim.SGD(m.parameters(), lr=0.3), loss=lambda z, y: (z**3).mean())
    capture, moments = fit(module, monitor("lambda_max", "hessian_trace"))
    for step, row in rows(capture).items():
        matrix = Curvature(network, module.loss, moments[step]).hessian(whole())
        # The share of an eigenvector that is off by a residual of 1e-6 is right to its square.
        assert row["hessian_trace"] == pytest.approx(float(matrix.trace()), rel=1e-11)
        assert row["hessian_trace_stderr"] == 0.0


def test_gauss_newton() -> None:
    module = Classifier(mlp(4, 6, 3), lambda m: torch.optim.SGD(m.parameters(), lr=0.3))
    capture, moments = fit(module, monitor("gauss_newton_lambda_max", "lambda_max"))
    for step, row in rows(capture).items():
        curvature = Curvature(module.network, module.loss, moments[step])
        gauss_newton, hessian = curvature.gauss_newton(whole()), curvature.hessian(whole())
        check_eigenvalue(row, "gauss_newton_lambda_max", gauss_newton, 0, TOLERANCE)
        check_eigenvalue(row, "lambda_max", hessian, 0, TOLERANCE)
        assert abs(row["gauss_newton_lambda_max"] - row["lambda_max"]) > 1e-4  # they are two matrices


def adam_diagonal(state: dict[str, Any]) -> Tensor:
    """√v̂ + ε with β₂ = 0.99 and the default ε."""
    return (state["exp_avg_sq"] / (1.0 - 0.99 ** float(state["step"]))).sqrt() + 1e-8


def rmsprop_diagonal(state: dict[str, Any]) -> Tensor:
    return state["square_avg"].sqrt() + 1e-8


# Optimizer, its P, threshold after t steps.
ADAPTIVE: dict[str, tuple[Any, Callable[[dict[str, Any]], Tensor], Callable[[int], float]]] = {
    "adam": (
        lambda m: torch.optim.Adam(m.parameters(), lr=0.01, betas=(0.8, 0.99)),
        adam_diagonal,
        lambda t: (2.0 + 1.6) * (1.0 - 0.8**t) / (0.2 * 0.01),
    ),
    "adamw": (
        lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, betas=(0.8, 0.99), weight_decay=0.5),
        adam_diagonal,
        lambda t: (2.0 - 0.01 * 0.5) * 1.8 * (1.0 - 0.8**t) / (0.2 * 0.01),
    ),
    "rmsprop": (
        lambda m: torch.optim.RMSprop(m.parameters(), lr=0.01, momentum=0.5),
        rmsprop_diagonal,
        lambda t: 3.0 / 0.01,
    ),
}


@pytest.mark.parametrize("name", ADAPTIVE)
def test_preconditioned(name: str) -> None:
    make, diagonal, threshold = ADAPTIVE[name]
    module = Classifier(mlp(4, 6, 3), make)
    capture, moments = fit(module, monitor("preconditioned_lambda_max", "lambda_max"))
    found = rows(capture)
    assert list(found) == list(MEASURED)
    # Before its first step an adaptive optimizer has no P; the Hessian is there all the same.
    assert math.isnan(found[0]["preconditioned_lambda_max"])
    for step, row in found.items():
        curvature = Curvature(module.network, module.loss, moments[step])
        hessian = curvature.hessian(whole())
        check_eigenvalue(row, "lambda_max", hessian, 0, TOLERANCE)
        assert "lambda_max_threshold" not in row
        if step > 0:
            p = {n: diagonal(state) for n, state in moments[step].state.items()}
            check_eigenvalue(
                row, "preconditioned_lambda_max", curvature.preconditioned(hessian, p), 0, tolerance=TOLERANCE
            )
            assert row["preconditioned_lambda_max_threshold"] == pytest.approx(threshold(step), rel=1e-12)


def test_preconditioner_of_sgd_is_one() -> None:
    module = Classifier(mlp(4, 6, 3), lambda m: torch.optim.SGD(m.parameters(), lr=0.3))
    capture, _ = fit(module, monitor("preconditioned_lambda_max", "lambda_max"))
    for row in rows(capture).values():
        # Two searches, each with an error below 1e-12 of the value.
        assert row["preconditioned_lambda_max"] == pytest.approx(row["lambda_max"], rel=1e-11)
        assert row["preconditioned_lambda_max_threshold"] == row["lambda_max_threshold"]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("micro", [None, 5])
@pytest.mark.thinned(4)
def test_second_moment(accumulate: int, micro: int | None) -> None:
    """Mini-batches of the criterion hold as many samples as a step: 8, or 16 accumulated, in micro-batches or whole."""
    module = Classifier(mlp(4, 6, 3), lambda m: torch.optim.SGD(m.parameters(), lr=3.0))
    capture, moments = fit(
        module,
        monitor("second_moment_contraction", micro_batch_size=micro),
        accumulate_grad_batches=accumulate,
        max_epochs=2 * accumulate,
    )
    x, y = samples()
    # Micro-batches of 5 do not add up to 8 or 16: smaller ones do, of 4.
    size = BATCH * accumulate
    groups = [[Part(x[i : i + size], y[i : i + size])] for i in range(0, SAMPLES, size)]
    found = rows(capture)
    assert len(found) == 4
    for step, row in found.items():
        matrix = Curvature(module.network, module.loss, moments[step]).contraction(groups, lr=3.0)
        excess = matrix - torch.eye(len(matrix)).double()
        assert row["second_moment_contraction_converged"] == 1.0
        assert row["second_moment_excess"] == pytest.approx(float(torch.linalg.eigvalsh(excess)[-1]), rel=1e-10)
        assert row["second_moment_contraction"] == pytest.approx(
            1.0 + row["second_moment_excess"], rel=1e-15
        )  # one rounding
        assert row["second_moment_contraction_error"] <= TOLERANCE * abs(
            row["second_moment_excess"] / row["second_moment_contraction"]
        ) * (1.0 + 1e-6)


def warmed_up(module: nn.Module) -> dict[str, Any]:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.8)
    scheduler = LambdaLR(optimizer, lambda t: min(1.0, (t + 1) / 5))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def by_epoch(module: nn.Module) -> dict[str, Any]:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.8)
    return {"optimizer": optimizer, "lr_scheduler": StepLR(optimizer, 1, 0.1)}


@pytest.mark.parametrize("make", [warmed_up, by_epoch])
@pytest.mark.thinned(2)
def test_learning_rate_is_that_of_the_step(make: Any) -> None:
    module = Classifier(mlp(4, 6, 3), make)
    capture, moments = fit(
        module, monitor("lambda_max", "second_moment_contraction", every_n_train_steps=1), max_epochs=2
    )
    x, y = samples()
    groups = [[Part(x[i : i + BATCH], y[i : i + BATCH])] for i in range(0, SAMPLES, BATCH)]
    found = rows(capture)
    assert len({row["lambda_max_threshold"] for row in found.values()}) == (5 if make is warmed_up else 2)
    for step, row in found.items():
        lr = moments[step].lr
        assert row["lambda_max_threshold"] == 2.0 / lr
        matrix = Curvature(module.network, module.loss, moments[step]).contraction(groups, lr)
        largest = float(torch.linalg.eigvalsh(matrix)[-1])
        # The residual is relative to the excess, which is no larger than the contraction here.
        assert row["second_moment_contraction"] == pytest.approx(largest, rel=1e-10)


THRESHOLDS: dict[str, tuple[Any, float]] = {
    "heavy ball": (lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9), 3.8 / 0.1),
    "nesterov": (lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.5, nesterov=True), 3.0 / 0.2),
    "weight decay": (lambda m: torch.optim.SGD(m.parameters(), lr=0.1, weight_decay=0.25), 20.0 - 0.25),
    "lbfgs": (lambda m: torch.optim.LBFGS(m.parameters(), lr=0.1, max_iter=3), 20.0),
}


@pytest.mark.parametrize("name", THRESHOLDS)
@pytest.mark.filterwarnings("ignore:LBFGS is not known")
def test_thresholds_of_other_optimizers(name: str) -> None:
    """Weight decay adds to the threshold, not to the Hessian: H is that of the loss."""
    make, threshold = THRESHOLDS[name]
    module = Classifier(mlp(4, 6, 3), make)
    capture, moments = fit(module, monitor("lambda_max"))
    for step, row in rows(capture).items():
        matrix = Curvature(module.network, module.loss, moments[step]).hessian(whole())
        check_eigenvalue(row, "lambda_max", matrix, 0, TOLERANCE)
        assert row["lambda_max_threshold"] == pytest.approx(threshold, rel=1e-14)  # two roundings


def test_dominant_negative_curvature() -> None:
    """Where the eigenvalue of largest magnitude is negative, the largest is still the algebraically largest."""
    loss = lambda z, y: F.cross_entropy(z, y) - 0.5 * z.square().mean()  # noqa: E731
    module = Classifier(mlp(4, 6, 3), lambda m: torch.optim.SGD(m.parameters(), lr=0.1), loss)
    capture, moments = fit(module, monitor("lambda_max", "lambda_min", k=2))
    for step, row in rows(capture).items():
        matrix = Curvature(module.network, loss, moments[step]).hessian(whole())
        check_eigenvalue(row, "lambda_max", matrix, 0, TOLERANCE)
        check_eigenvalue(row, "lambda_2", matrix, 1, TOLERANCE)
        check_eigenvalue(row, "lambda_min", matrix, -1, TOLERANCE)
        assert row["lambda_min"] < -2.0 * abs(row["lambda_max"])


def test_spectral_density_has_the_moments_of_the_spectrum(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_curvature.spectrum import monitor as spectrum

    densities: list[Any] = []
    monkeypatch.setattr(spectrum, "report_density", lambda trainer, key, density: densities.append((key, density)))
    module = Classifier(mlp(4, 6, 3), lambda m: torch.optim.SGD(m.parameters(), lr=0.3))
    options = {"density_starts": 8, "density_steps": 20}
    _, moments = fit(module, monitor("lambda_max", "spectral_density", k=3, **options))
    assert [key for key, _ in densities] == ["curvature/spectral_density"] * len(MEASURED)
    for step, (_, density) in zip(MEASURED, densities, strict=True):
        values = torch.linalg.eigvalsh(Curvature(module.network, module.loss, moments[step]).hessian(whole()))
        assert density.dimension == len(values)
        for power in (1, 2):
            truth = float((values**power).mean())
            # Eight starts: a t of seven degrees of freedom exceeds 5.4 in one case of a thousand.
            assert abs(density.moment(power) - truth) <= 5.4 * density.moment_error(power) + ROUNDING
