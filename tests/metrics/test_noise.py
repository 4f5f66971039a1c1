"""Metrics of the noise covariance: sums over samples that merge, without any callback."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

from lightning_curvature.functional.noise import noise_covariance, power_law
from lightning_curvature.metrics import NoiseCovariance, NoiseCurvatureRelation
from tests.helpers.processes import run_on_ranks
from tests.oracles.noise import Samples, samples_of

COUNT = 60
# Sums in another order, and eigenvectors of a matrix whose entries are right to 1e-15: H_ii down to 1e-4 of the
# largest one then have ten digits.
CLOSE = 1e-10


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(COUNT, 5, generator=generator, dtype=torch.float64),
        torch.randint(0, 3, (COUNT,), generator=generator),
    )


def dense() -> Samples:
    return samples_of(network(), nn.functional.cross_entropy, "0.weight", *data())


def made(model: nn.Module | None = None, **options: Any) -> NoiseCurvatureRelation:
    return NoiseCurvatureRelation(
        network() if model is None else model, nn.functional.cross_entropy, parameter="0.weight", **options
    )


def fed(metric: Any, first: int = 0, last: int = COUNT, size: int = 16) -> Any:
    inputs, targets = data()
    for start in range(first, last, size):
        metric.update(inputs[start : min(start + size, last)], targets[start : min(start + size, last)])
    return metric


def test_covariance_in_parts_is_that_of_all() -> None:
    gradients = dense().gradients
    metric = NoiseCovariance(20, batch_size=4)
    for part in gradients.split([1, 20, 39]):
        metric.update(part)
    torch.testing.assert_close(metric.compute(), noise_covariance(gradients, 4), rtol=1e-12, atol=1e-16)
    metric.reset()
    assert bool(metric.compute().isnan().all())


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


def test_it_is_invariant_to_the_cut_into_batches() -> None:
    whole, parts = fed(made(), size=COUNT).compute(), fed(made(), size=7).compute()
    assert whole == pytest.approx(parts, abs=CLOSE)


def test_no_gradients_are_left_on_the_model() -> None:
    model = network()
    before = [p.detach().clone() for p in model.parameters()]
    fed(made(model)).compute()
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_in_a_collection_and_after_a_reset() -> None:
    collection = MetricCollection({"relation": made(quantities=("noise_alignment",))})
    fed(collection)
    first = collection.compute()
    collection.reset()
    fed(collection)
    # A collection spreads the values of a dict over keys of its own.
    assert first == collection.compute()
    assert set(first) == {"noise_alignment"}
    assert 0.0 < first["noise_alignment"] < 1.0


def test_a_layer_that_is_the_model_itself() -> None:
    layer = nn.Linear(5, 3).double()
    metric = NoiseCurvatureRelation(layer, nn.functional.cross_entropy, parameter="weight")
    fed(metric)
    expected = samples_of(layer, nn.functional.cross_entropy, "weight", *data())
    metric.compute()
    assert metric.relation is not None
    count = len(metric.relation.curvatures)
    torch.testing.assert_close(metric.relation.curvatures, expected.basis()[0][:count], rtol=CLOSE, atol=CLOSE)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"weight of a torch.nn.Linear, got '1.weight': choose one of \['0.weight'"):
        NoiseCurvatureRelation(network(), nn.functional.cross_entropy, parameter="1.weight")
    with pytest.raises(ValueError, match=r"samples must be added before .* got none: call update first"):
        made().compute()
    with pytest.raises(ValueError, match=r"gradients must be \(n, 3\), got \(2, 4\): give one flat row a sample"):
        NoiseCovariance(3).update(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="size must be at least 1, got 0: 1 is a single one"):
        NoiseCovariance(0)

    with pytest.raises(ValueError, match="quantities must not hold 'noise_awd_chain' here, got it: NoiseCovarianceMo"):
        made(quantities=("noise_awd_chain",))
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


def on_ranks(rank: int, world_size: int) -> dict[str, Any]:
    """Rank 0 has 40 samples, rank 1 20."""
    relation = fed(made(), *((0, 40) if rank == 0 else (40, COUNT)))
    covariance = NoiseCovariance(20)
    covariance.update(dense().gradients[:40] if rank == 0 else dense().gradients[40:])
    return {"relation": relation.compute(), "covariance": covariance.compute()}


def test_two_ranks_give_the_values_of_one() -> None:
    expected = fed(made()).compute()
    covariance = noise_covariance(dense().gradients)
    for found in run_on_ranks(__name__, ["on_ranks"])["on_ranks"]:
        assert found["relation"] == pytest.approx(expected, abs=CLOSE)
        torch.testing.assert_close(found["covariance"], covariance, rtol=1e-12, atol=1e-16)
