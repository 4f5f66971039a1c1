"""The metrics of mini-batch sharpness where types, gradients or arguments are at an edge."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lightning_curvature.metrics import (
    BatchSharpness,
    GradientNoiseInteraction,
    InteractionAwareSharpness,
    ModifiedBatchSharpness,
    StepSharpness,
)
from tests.helpers.runs import mlp
from tests.helpers.sharpness_metrics import CLOSE, CURVATURE, DATA, MOVING, STILL, Point, fed, quadratic


def test_parameters_in_float64_are_not_rounded_to_float32() -> None:
    metric = BatchSharpness(Point(2.0**-40 + 1.0), quadratic)
    ones = torch.ones(1, dtype=torch.float64)
    # The gradient is h·2⁻⁴⁰, 0 in float32.
    metric.update(ones, ones)
    assert int(metric.skipped) == 0
    assert metric.compute().item() == pytest.approx(CURVATURE, **CLOSE)


def test_a_mini_batch_without_gradient() -> None:
    point, mean, full = Point(1.0), torch.cat([STILL, MOVING]), CURVATURE
    batches = [(STILL, STILL), (MOVING, MOVING), (MOVING, MOVING), (STILL, STILL)]
    batch = BatchSharpness(point, quadratic)
    # Left out and counted.
    assert fed(batch, batches) == pytest.approx(full, **CLOSE)
    assert (batch.count(), int(batch.skipped)) == (2, 2)
    batch.reset()
    assert int(batch.skipped) == 0
    step = StepSharpness(point, quadratic)
    step.update(MOVING, MOVING)
    step.update(STILL, STILL)
    assert step.compute().isnan()
    step.update(MOVING, MOVING)
    assert (step.compute().item(), int(step.skipped)) == (pytest.approx(full, **CLOSE), 0)
    # So it is in a ratio of means, where it adds nothing; not in a pair with one that has a gradient.
    modified, ias = (kind(point, quadratic) for kind in (ModifiedBatchSharpness, InteractionAwareSharpness))
    assert fed(modified, batches) == pytest.approx(full, **CLOSE)
    assert (modified.count(), int(modified.skipped)) == (2, 2)
    assert fed(ias, batches) == pytest.approx(full, **CLOSE)
    assert (ias.count(), int(ias.skipped)) == (2, 0)
    fed(ias, [(STILL, STILL)] * 2)
    assert (ias.count(), int(ias.skipped)) == (2, 1)
    # GNI's denominator does not vanish with it.
    gni = GradientNoiseInteraction(point, quadratic, data=[(mean, mean)])
    # E[g_B²] = h²/2, g² = h²/4.
    assert fed(gni, batches) == pytest.approx(2.0 * full, **CLOSE)
    assert gni.count() == 4
    # Whether left out or not, it is one of the batches over which the law takes its means.
    ias = InteractionAwareSharpness(point, quadratic, data=[(mean, mean)])
    assert fed(ias, batches) == pytest.approx(full, **CLOSE)
    assert (ias.count(), int(ias.skipped)) == (2, 2)
    for law in (gni.noise_terms(), ias.noise_terms()):
        # Gradients of samples are 0 and −h: variance h²/4, curvature h.
        assert law.noise_square == pytest.approx(full**2 / 4.0, **CLOSE)
        assert law.noise_curvature == pytest.approx(full**3 / 4.0, **CLOSE)
    # Pairs of one with and one without: their dot products are all 0, and do not say how large g is.
    pairs = GradientNoiseInteraction(point, quadratic)
    pairs.update(STILL, STILL)
    pairs.update(MOVING, MOVING)
    assert pairs.compute().isnan()
    assert pairs.count() == 1


def test_errors_of_other_batch_sizes_are_explained() -> None:
    network = mlp(4, 3, 3)
    with pytest.raises(ValueError, match=r"^data must be given for other batch sizes, got none: pass all"):
        GradientNoiseInteraction(network, F.cross_entropy).over_batch_sizes(1)
    metric = GradientNoiseInteraction(network, F.cross_entropy, data=DATA)
    with pytest.raises(ValueError, match=r"^mini-batches must be given first, got none: call update with each of them"):
        metric.over_batch_sizes(1)
    whole = tuple(torch.cat(parts) for parts in zip(*DATA, strict=True))
    metric.update(*whole)
    with pytest.raises(ValueError, match=r"^batch_size must be below the number of samples, got 8\.0 of 8: batches of"):
        metric.over_batch_sizes(1)
    assert metric.over_batch_sizes(8, replacement=True).isfinite()
    with pytest.raises(ValueError, match=r"^batch_size must not be above the number of samples, 8, got 9: larger"):
        metric.reset()
        metric.update(*DATA[0])
        metric.over_batch_sizes([1, 9])
