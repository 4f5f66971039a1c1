"""Habits of the metrics that collect batches: what they keep, share and count."""

from __future__ import annotations

import copy
import types
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


def fed(metric: Any, batches: list[Batch]) -> float:
    for x, y in batches:
        metric.update(x, y)
    value = metric.compute()
    return float(next(iter(value.values())) if isinstance(value, dict) else value)


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


def test_a_shallow_copy_measures_the_model_that_is_trained() -> None:
    network, batches = mlp(4, 5, 3), ragged()
    metric = eigenvalue(network)
    copied = copy.copy(metric)
    before = truth(network, batches)
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(1.5)
    after = truth(network, batches)
    assert abs(after - before) > 0.1 * before
    for one in (metric, copied):
        one.reset()
        assert fed(one, batches) == pytest.approx(after, **CLOSE)


def test_a_clone_has_vectors_of_its_own() -> None:
    metric = eigenvalue(mlp(4, 5, 3))
    fed(metric, ragged())
    assert metric.pairs is not None
    assert metric.clone().pairs is not metric.pairs


def test_a_collection_keeps_them_apart() -> None:
    network, batches = mlp(4, 5, 3), ragged()
    metrics: dict[str, Any] = {
        "top": eigenvalue(network),
        "trace": HessianTrace(network, F.cross_entropy, relative_error=0.06),
        "density": HessianDensity(network, F.cross_entropy, starts=1, steps=4),
    }
    collection, matrix = MetricCollection(metrics), dense(network, batches)
    for batch in batches:
        collection.update(*batch)
    values = collection.compute()
    assert float(values["top"]) == pytest.approx(float(torch.linalg.eigvalsh(matrix)[-1]), **CLOSE)
    # Three standard errors of at most 0.06 of it.
    assert float(values["trace"]) == pytest.approx(float(matrix.trace()), rel=0.18)
    assert values["density"].shape[0] == 2


def test_batches_in_objects_are_copies_too() -> None:
    """Also where torch's trees do not look inside, as into a namespace."""
    network, batches = mlp(4, 5, 3), ragged()
    metric = eigenvalue(network, lambda z, t: F.cross_entropy(z, t["y"].labels))
    for x, y in batches:
        target = types.SimpleNamespace(labels=y.clone())
        metric.update(x, {"count": y, "y": target})
        target.labels.zero_()
    assert float(metric.compute()) == pytest.approx(truth(network, batches), **CLOSE)
