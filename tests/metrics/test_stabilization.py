"""The metric of sample growth: a mean over probes that merges, in a loop without any callback."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_curvature.functional import gaussian_moment, increment
from lightning_curvature.metrics import StabilizationCriterion
from tests.helpers.growth import model_of
from tests.oracles.sample_growth import dense_increment, random_quadratics


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("order", [1.0, 2.0, 3.5])
@pytest.mark.parametrize("shape", [(40,), (40, 3)])
def test_mean_power_and_its_standard_error(order: float, shape: tuple[int, ...]) -> None:
    values = normal(*shape)
    metric = StabilizationCriterion(order)
    for part in values.split([1, 4, 35]):
        metric.update(part)
    powers = (values.abs() ** order).reshape(40, -1).mean(1)
    assert float(metric.compute()) == pytest.approx(float(powers.mean()), rel=1e-13)
    assert float(metric.standard_error()) == pytest.approx(float(powers.std()) / math.sqrt(40), rel=1e-12)
    assert metric.count() == 40


def test_in_a_plain_loop_it_finds_the_closed_form() -> None:
    quadratics, w = random_quadratics(9, 4), torch.ones(4, dtype=torch.float64)
    metric = StabilizationCriterion()
    for z in 0.3 * normal(2000, 4):
        losses = quadratics.losses(w + z)
        metric.update(increment(losses[8:9], losses[:8].mean(), 8))
    expected = float(gaussian_moment(model_of(dense_increment(quadratics.losses, w, 8)), 0.3))
    error = float(metric.standard_error())
    assert abs(float(metric.compute()) - expected) < 4.0 * error
    assert error < 0.05 * expected


def test_float32_increments_of_any_size() -> None:
    """Squares of float32 numbers leave its range where the numbers do not."""
    metric = StabilizationCriterion()
    metric.update(torch.tensor([1e-30, 3e-30]))
    assert float(metric.compute()) == pytest.approx(5e-60, rel=1e-6)


def test_no_perturbations_add_nothing() -> None:
    metric, values = StabilizationCriterion(), normal(11, 2)
    metric.update(values)
    metric.update(values[:0])
    assert metric.count() == 11
    assert float(metric.compute()) == pytest.approx(float(values.square().mean()), rel=1e-14)
    assert math.isnan(float(StabilizationCriterion().compute()))
