"""What the metrics of mini-batch sharpness cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lightning_curvature.metrics import BatchLambdaMax
from lightning_curvature.operators import HessianOperator
from tests.helpers.operators import Counter
from tests.helpers.runs import mlp
from tests.helpers.sharpness_metrics import BATCHES, METRICS


@pytest.mark.parametrize(
    ("name", "options", "forwards", "products"),
    [
        ("batch", {}, [1, 1, 1, 1], [1, 1, 1, 1]),
        ("modified", {}, [1, 1, 1, 1], [1, 1, 1, 1]),
        ("step", {}, [1, 1, 1, 1], [1, 1, 1, 1]),
        ("ias", {}, [0, 2, 0, 2], [0, 2, 0, 2]),
        ("gni", {}, [0, 2, 0, 2], [0, 2, 0, 2]),
        # The data are two batches: a forward of each, a product with each.
        ("ias, data", {}, [3, 3, 3, 3], [2, 2, 2, 2]),
        ("gni, data", {}, [3, 3, 3, 3], [2, 2, 2, 2]),
        ("ias, data", {"keep_graph": False}, [3, 3, 3, 3], [2, 2, 2, 2]),
        # The gradient beside the product.
        ("gni, data", {"keep_graph": False}, [5, 5, 5, 5], [2, 2, 2, 2]),
    ],
)
def test_cost(
    name: str, options: Any, forwards: list[int], products: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = mlp(4, 3, 3)
    calls = dict.fromkeys(("_build", "product_of"), 0)

    def counted(method: str) -> Any:
        original = getattr(HessianOperator, method)

        def call(self: HessianOperator, *args: Any) -> Any:
            calls[method] += 1
            return original(self, *args)

        return call

    for method in calls:
        monkeypatch.setattr(HessianOperator, method, counted(method))
    counter, metric = Counter(network), METRICS[name](network, F.cross_entropy, **options)

    def spent(act: Callable[[], Any]) -> tuple[int, int, int]:
        """Forwards, of these with a graph that can be differentiated twice, and products."""
        before = (counter.count, *calls.values())
        act()
        now = (counter.count, *calls.values())
        return now[0] - before[0], now[1] - before[1], now[2] - before[2]

    # With the data only their graphs are needed, not that of the mini-batch.
    plain = 1 if name.endswith("data") else 0
    expected = [(count, count - plain, product) for count, product in zip(forwards, products, strict=True)]
    assert [spent(lambda batch=batch: metric.update(*batch)) for batch in BATCHES[:4]] == expected
    assert spent(metric.compute) == spent(metric.standard_error) == (0, 0, 0)
    if plain:
        count = 4 if options.get("keep_graph", True) is False else 2
        assert spent(lambda: metric.over_batch_sizes([1, 2])) == (count, count, 2)


def test_eigenvalues_begin_with_the_last_vector() -> None:
    # In up to 128 dimensions the search makes sure of the largest, wherever it begins.
    network = mlp(4, 24, 3)
    metric = BatchLambdaMax(network, F.cross_entropy, tolerance=1e-3)
    metric.update(*BATCHES[0])
    cold = metric.pairs
    counter = Counter(network)
    metric.update(*BATCHES[0])
    assert counter.count == 1
    assert cold is not None
    assert metric.pairs is not None
    assert torch.allclose(metric.pairs.values, cold.values, rtol=1e-5, atol=0.0)
    assert metric.pairs.matvecs < cold.matvecs
