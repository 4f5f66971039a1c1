"""The metrics of mini-batch sharpness as torchmetrics and training loops treat them."""

from __future__ import annotations

import copy
import pickle

import matplotlib
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MetricCollection

from tests.helpers.runs import mlp
from tests.helpers.sharpness_metrics import BATCHES, CLOSE, DATA, METRICS, RESTARTED, every_metric, fed, made, value_of

matplotlib.use("Agg")


def train(network: nn.Module) -> None:
    """Stand in for some training."""
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(1.5)


@every_metric
def test_clones_measure_the_model_that_is_trained(name: str) -> None:
    network = mlp(4, 3, 3)
    metric = made(name, network)
    cloned = [metric.clone(), copy.deepcopy(metric), MetricCollection([metric]).clone()[type(metric).__name__]]
    before = value_of(name, BATCHES, network)
    train(network)
    after = value_of(name, BATCHES, network)
    assert abs(after - before) > 1e-3 * abs(before)
    for one in (metric, *cloned):
        assert fed(one, BATCHES) == pytest.approx(after, **CLOSE)


@every_metric
def test_clones_and_pickles_go_on_from_where_it_was(name: str) -> None:
    metric, truth = made(name), value_of(name, BATCHES)
    # After an odd number, so that of pairs one waits.
    early = fed(metric, BATCHES[:3])
    for twin in (metric.clone(), pickle.loads(pickle.dumps(metric))):
        assert fed(twin, BATCHES[3:]) == pytest.approx(truth, **CLOSE)
    assert metric.compute().item() == early
    if name.endswith("data"):
        assert metric.clone()._data[0][0] is DATA[0][0]  # all samples once in memory
    assert fed(metric, BATCHES[3:]) == pytest.approx(truth, **CLOSE)


@every_metric
def test_reset_forgets_the_draws(name: str) -> None:
    metric = made(name)
    fed(metric, BATCHES[:3])
    metric.reset()
    # The eigenvector stays.
    close = RESTARTED if name == "lambda_max" else CLOSE
    assert fed(metric, BATCHES[2:]) == pytest.approx(value_of(name, BATCHES[2:]), **close)
    assert metric.count() == {"step": 1, "ias": 2, "gni": 2}.get(name, 4)


@every_metric
def test_forward_gives_what_a_batch_adds_and_keeps_all(name: str) -> None:
    metric, paired = made(name), name in ("ias", "gni")
    for index, batch in enumerate(BATCHES):
        given = metric(*batch)
        if paired and index % 2 == 0:
            assert given.isnan()
            continue
        alone = value_of(name, BATCHES[index - 1 : index + 1] if paired else [batch])
        assert given.item() == pytest.approx(alone, nan_ok=True, **(RESTARTED if name == "lambda_max" else CLOSE))
        assert metric._forward_cache is given
    assert metric.compute().item() == pytest.approx(value_of(name, BATCHES), **CLOSE)


@every_metric
def test_a_batch_that_fails_loses_no_other(name: str) -> None:
    failing = [False]

    def loss(z: Tensor, y: Tensor) -> Tensor:
        if failing[0]:
            raise RuntimeError("no loss")
        return F.cross_entropy(z, y)

    metric = METRICS[name](mlp(4, 3, 3), loss)
    for batch in BATCHES[:3]:
        metric(*batch)
    for act in (metric, metric.update):
        failing[0] = True
        with pytest.raises(RuntimeError, match="no loss"):
            act(*BATCHES[5])
        failing[0] = False
    if name == "step":
        assert metric.compute().isnan()  # the last batch gave nothing
    assert fed(metric, BATCHES[3:]) == pytest.approx(value_of(name, BATCHES), **CLOSE)


def test_a_collection_keeps_them_apart() -> None:
    """Torchmetrics updates one metric for several whose states are close after the first batch."""
    network = mlp(4, 3, 3)
    # All gradients, and so all curvatures, below 1e-8, which it takes for equal.
    tiny = lambda z, y: 1e-12 * F.cross_entropy(z, y)  # noqa: E731
    for loss in (F.cross_entropy, tiny):
        for feed in (MetricCollection.update, MetricCollection.forward):
            collection = MetricCollection({name.replace(", ", "_"): METRICS[name](network, loss) for name in METRICS})
            for batch in BATCHES:
                feed(collection, *batch)
            found = collection.compute()
            for name in METRICS:
                expected = fed(METRICS[name](network, loss), BATCHES)
                assert found[name.replace(", ", "_")].item() == pytest.approx(expected, nan_ok=True, **CLOSE), name
            # Not by numbers that agree.
            assert len({round(value.item() / found["batch"].item(), 6) for value in found.values()}) == len(METRICS)


@every_metric
def test_merged_metrics_equal_one_over_the_union(name: str) -> None:
    first, second = made(name), made(name)
    for index, batch in enumerate(BATCHES):
        (first if index < 2 else second).update(*batch)
    first.merge_state(second)
    expected = made(name)
    fed(expected, BATCHES)
    if name == "step":
        last = [value_of(name, [BATCHES[1]]), value_of(name, [BATCHES[5]])]
        assert first.compute().item() == pytest.approx(sum(last) / 2.0, **CLOSE)
        return
    close = RESTARTED if name == "lambda_max" else CLOSE
    assert first.compute().item() == pytest.approx(expected.compute().item(), **close)
    # Sums of squares of differences: ten times the error of the values.
    assert first.standard_error().item() == pytest.approx(expected.standard_error().item(), rel=10.0 * close["rel"])
    if name in ("ias, data", "gni, data"):
        assert torch.allclose(first.over_batch_sizes([1, 8]), expected.over_batch_sizes([1, 8]), rtol=1e-11, atol=0.0)


def test_plot_draws_the_values() -> None:
    metric = made("batch")
    fed(metric, BATCHES)
    figure, _ = metric.plot()
    assert isinstance(figure, matplotlib.figure.Figure)
    _, axes = metric.plot([torch.tensor(v) for v in (1.0, 3.0, 2.0)])
    assert [float(y) for y in axes.lines[0].get_ydata()] == [1.0, 3.0, 2.0]
    matplotlib.pyplot.close("all")
