"""The metrics as torchmetrics and training loops treat them: clones, forward, collections, targets of any structure."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MetricCollection

from lightning_curvature.metrics import HessianDensity, HessianEigenvalues, HessianTrace
from tests.helpers.runs import Batch, mlp
from tests.helpers.spectrum_metrics import dense, ragged

# As in test_spectrum.py: eigenvalues are within their residuals, 1e-9.
TOLERANCE = 1e-9
CLOSE = {"rel": 2e-9}


def eigenvalue(network: nn.Module, loss: Any = F.cross_entropy) -> HessianEigenvalues:
    return HessianEigenvalues(network, loss, tolerance=TOLERANCE)


def truth(network: nn.Module, batches: list[Batch]) -> float:
    return float(torch.linalg.eigvalsh(dense(network, batches))[-1])


def train(network: nn.Module) -> None:
    """Stand in for some training."""
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(1.5)


def fed(metric: Any, batches: list[Batch]) -> float:
    for x, y in batches:
        metric.update(x, y)
    value = metric.compute()
    return float(next(iter(value.values())) if isinstance(value, dict) else value)


@pytest.mark.parametrize("clone", [lambda m: m.clone(), copy.deepcopy, copy.copy], ids=["clone", "deepcopy", "copy"])
def test_a_clone_measures_the_model_that_is_trained(clone: Any) -> None:
    network, batches = mlp(4, 5, 3), ragged()
    before = truth(network, batches)
    metric = eigenvalue(network)
    cloned = clone(metric)
    train(network)
    after = truth(network, batches)
    assert abs(after - before) > 0.1 * before
    for one in (metric, cloned):
        one.reset()
        assert fed(one, batches) == pytest.approx(after, **CLOSE)


def test_a_clone_keeps_data_and_vectors_of_its_own() -> None:
    network, (first, second) = mlp(4, 5, 3), ragged()
    metric = eigenvalue(network)
    fed(metric, [first])
    cloned = metric.clone()
    # Before it is given any more.
    assert float(cloned.compute()) == pytest.approx(truth(network, [first]), **CLOSE)
    assert fed(cloned, [second]) == pytest.approx(truth(network, [first, second]), **CLOSE)
    assert float(metric.compute()) == pytest.approx(truth(network, [first]), **CLOSE)
    metric.reset()
    assert fed(metric, [second]) == pytest.approx(truth(network, [second]), **CLOSE)
    assert metric.pairs is not None
    assert cloned.pairs is not metric.pairs


def test_forward_gives_the_batch_and_keeps_all_of_them() -> None:
    network, batches = mlp(4, 5, 3), ragged()
    metric = eigenvalue(network)
    for batch in batches:
        assert float(metric(*batch)) == pytest.approx(truth(network, [batch]), **CLOSE)
    whole = truth(network, batches)
    assert abs(whole - truth(network, batches[1:])) > 1e-3
    assert float(metric.compute()) == pytest.approx(whole, **CLOSE)
    metric.reset()
    assert float(metric(*batches[1])) == pytest.approx(truth(network, batches[1:]), **CLOSE)
    assert float(metric.compute()) == pytest.approx(truth(network, batches[1:]), **CLOSE)


def test_forward_that_fails_loses_no_batch() -> None:
    network, batches = mlp(4, 5, 3), ragged()
    failing = [False]

    def loss(z: Tensor, y: Tensor) -> Tensor:
        if failing[0]:
            raise RuntimeError("no loss")
        return F.cross_entropy(z, y)

    metric = eigenvalue(network, loss)
    metric(*batches[0])
    failing[0] = True
    with pytest.raises(RuntimeError, match="no loss"):
        metric(*batches[1])
    failing[0] = False
    assert float(metric.compute()) == pytest.approx(truth(network, batches), **CLOSE)


def test_targets_are_counted_by_their_samples() -> None:
    """A dict of one entry is no batch of one sample: batches of 8 and 3."""
    network, batches = mlp(4, 5, 3), ragged()
    expected = truth(network, batches)
    losses = {"dict": lambda z, t: F.cross_entropy(z, t["y"]), "tuple": lambda z, t: F.cross_entropy(z, t[0])}
    for kind, loss in losses.items():
        metric = eigenvalue(network, loss)
        for x, y in batches:
            metric.update(x, {"y": y} if kind == "dict" else (y, y.double()))
        assert float(metric.compute()) == pytest.approx(expected, **CLOSE), kind
    # Equal weights of both batches would give another number.
    halves = sum(dense(network, [batch]) for batch in batches) / 2
    assert abs(float(torch.linalg.eigvalsh(halves)[-1]) - expected) > 1e-3


def test_targets_without_samples_are_refused() -> None:
    metric = eigenvalue(mlp(4, 5, 3), lambda z, t: z.square().mean())
    metric.update(ragged()[0][0], "none")
    with pytest.raises(ValueError, match=r"^targets must hold a tensor with the samples along its first dimension, "):
        metric.compute()


def test_collection() -> None:
    network, batches = mlp(4, 5, 3), ragged()
    metrics: dict[str, Any] = {
        "top": eigenvalue(network),
        "trace": HessianTrace(network, F.cross_entropy, relative_error=0.06),
        "density": HessianDensity(network, F.cross_entropy, starts=1, steps=4),
    }
    collection = MetricCollection(metrics)
    cloned = collection.clone(prefix="train_")
    train(network)
    matrix = dense(network, batches)
    for one, prefix in ((collection, ""), (cloned, "train_")):
        for batch in batches:
            step = one(*batch)
            assert float(step[f"{prefix}top"]) == pytest.approx(truth(network, [batch]), **CLOSE)
        values = one.compute()
        assert set(values) == {f"{prefix}{name}" for name in metrics}
        assert float(values[f"{prefix}top"]) == pytest.approx(float(torch.linalg.eigvalsh(matrix)[-1]), **CLOSE)
        # Three standard errors of at most 0.06 of it.
        assert float(values[f"{prefix}trace"]) == pytest.approx(float(matrix.trace()), rel=0.18)
        assert values[f"{prefix}density"].shape[0] == 2
        one.reset()
        assert fed(MetricCollection([one["top"]]), batches[1:]) == pytest.approx(truth(network, batches[1:]), **CLOSE)
