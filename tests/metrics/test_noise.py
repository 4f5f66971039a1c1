"""Metrics of the noise covariance against dense derivatives, and losses and layers that they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_curvature.functional.noise import noise_covariance, power_law
from lightning_curvature.metrics import NoiseCovariance, NoiseCurvatureRelation
from tests.oracles.noise import Samples, samples_of
from tests.testers.metric_cases.noise import COUNT, data, made, network

# Sums in another order, and eigenvectors of a matrix whose entries are right to 1e-15: H_ii down to 1e-4 of the
# largest one then have ten digits.
CLOSE = 1e-10


def dense() -> Samples:
    return samples_of(network(), nn.functional.cross_entropy, "0.weight", *data())


def fed(metric: Any, first: int = 0, last: int = COUNT, size: int = 16) -> Any:
    inputs, targets = data()
    for start in range(first, last, size):
        metric.update(inputs[start : min(start + size, last)], targets[start : min(start + size, last)])
    return metric


def test_a_merge_of_other_sizes_leaves_both_alone() -> None:
    small, large = NoiseCovariance(2), NoiseCovariance(3)
    small.update(torch.eye(2))
    large.update(torch.eye(3))
    before = small.compute()
    rule = r"^incoming_state must be a NoiseCovariance or a dict of its states, of the same sizes, got a "
    for other, got in ((large, r"NoiseCovariance \("), ({}, r"dict \(not all of"), (noise_covariance, "function")):
        with pytest.raises(ValueError, match=rule + got):
            small.merge_state(other)  # type: ignore[arg-type]
    assert torch.equal(small.compute(), before)


def test_covariance_is_that_of_the_function_and_nan_without_samples() -> None:
    gradients = dense().gradients
    metric = NoiseCovariance(20, batch_size=4)
    for part in gradients.split([1, 20, 39]):
        metric.update(part)
    torch.testing.assert_close(metric.compute(), noise_covariance(gradients, 4), rtol=1e-12, atol=1e-16)
    metric.reset()
    assert bool(metric.compute().isnan().all())


def test_values_are_those_that_were_asked_for() -> None:
    values = fed(made(quantities=("noise_alignment",))).compute()
    assert set(values) == {"noise_alignment"}
    assert 0.0 < values["noise_alignment"] < 1.0


def test_relation_is_that_of_dense_derivatives() -> None:
    metric = fed(made(batch_size=7, top=6))
    values = metric.compute()
    samples = dense()
    curvatures, vectors = samples.basis()
    v = vectors[:6]
    law = power_law(curvatures[:6], (v @ samples.covariance() @ v.T).diagonal())
    duality = power_law(curvatures[:6], (v @ samples.second_moment() @ v.T).diagonal())
    assert values["noise_gamma"] == pytest.approx(law.exponent, abs=CLOSE)
    assert values["noise_gamma_stderr"] == pytest.approx(law.standard_error, abs=CLOSE)
    assert values["noise_gamma_awd"] == pytest.approx(duality.exponent, abs=CLOSE)
    relation = metric.relation
    torch.testing.assert_close(relation.curvatures, curvatures[:6], rtol=CLOSE, atol=CLOSE)
    expected = (v @ samples.covariance(7) @ v.T).diagonal()
    torch.testing.assert_close(relation.variances, expected, rtol=1e-8, atol=1e-14)
    assert relation.samples == COUNT
    assert relation.dimension == 20


def test_a_layer_that_is_the_model_itself() -> None:
    layer = nn.Linear(5, 3).double()
    metric = NoiseCurvatureRelation(layer, nn.functional.cross_entropy, parameter="weight")
    fed(metric)
    expected = samples_of(layer, nn.functional.cross_entropy, "weight", *data())
    metric.compute()
    assert metric.relation is not None
    count = len(metric.relation.curvatures)
    torch.testing.assert_close(metric.relation.curvatures, expected.basis()[0][:count], rtol=CLOSE, atol=CLOSE)


def test_a_loss_or_a_layer_that_does_not_fit() -> None:
    for loss in (nn.CrossEntropyLoss(reduction="sum"), nn.CrossEntropyLoss(torch.tensor([9.0, 1.0, 1.0]).double())):
        metric = NoiseCurvatureRelation(network(), loss, parameter="0.weight")
        with pytest.raises(ValueError, match=r"must be the mean over the samples of a batch, got .* use reduction='me"):
            fed(metric)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x))

    metric = NoiseCurvatureRelation(Twice().double(), nn.functional.cross_entropy, parameter="layer.weight")
    with pytest.raises(ValueError, match="the layer is called 2 times for a batch"):
        fed(metric)
