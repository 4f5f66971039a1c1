"""Habits of the metrics of mini-batch sharpness that other metrics do not share: see test_contract.py."""

from __future__ import annotations

import pytest
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MetricCollection

from tests.helpers.runs import mlp
from tests.helpers.sharpness_metrics import BATCHES, CLOSE, DATA, METRICS, fed, made


def test_a_collection_keeps_them_apart() -> None:
    """Torchmetrics updates one metric for several whose states are close after the first batch."""
    network = mlp(4, 3, 3)
    # All gradients, and so all curvatures, below 1e-8, which it takes for equal.
    tiny = lambda z, y: 1e-12 * F.cross_entropy(z, y)  # noqa: E731
    for loss in (F.cross_entropy, tiny):
        expected = {name: fed(METRICS[name](network, loss), BATCHES) for name in METRICS}
        for feed in (MetricCollection.update, MetricCollection.forward):
            collection = MetricCollection({name.replace(", ", "_"): METRICS[name](network, loss) for name in METRICS})
            for batch in BATCHES:
                feed(collection, *batch)
            found = collection.compute()
            for name in METRICS:
                given = found[name.replace(", ", "_")].item()
                assert given == pytest.approx(expected[name], nan_ok=True, **CLOSE), name
            # Not by numbers that agree.
            assert len({round(value.item() / found["batch"].item(), 6) for value in found.values()}) == len(METRICS)


@pytest.mark.parametrize("name", ["ias, data", "gni, data"])
def test_a_clone_shares_all_samples(name: str) -> None:
    assert made(name).clone()._data[0][0] is DATA[0][0]


def test_step_sharpness_is_of_the_last_batch_that_did_not_fail() -> None:
    failing = [False]

    def loss(z: Tensor, y: Tensor) -> Tensor:
        if failing[0]:
            raise RuntimeError("no loss")
        return F.cross_entropy(z, y)

    metric = METRICS["step"](mlp(4, 3, 3), loss)
    value = metric(*BATCHES[0])
    failing[0] = True
    for act in (metric.update, metric.forward):
        with pytest.raises(RuntimeError, match="no loss"):
            act(*BATCHES[1])
        assert metric.compute() == value
