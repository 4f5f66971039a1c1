"""Cost of a stabilization measurement: products, forwards, and vectors that are kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_curvature import StabilizationMonitor
from lightning_curvature.operators import HessianOperator, exact
from lightning_curvature.stabilization.result import SampleGrowth
from tests.helpers.counting import on_forward
from tests.helpers.runs import make_trainer
from tests.helpers.stabilization_values import CANDIDATES, classifier_case

SIZES = (2, 6)


def measured(**options: Any) -> SampleGrowth:
    defaults: dict[str, Any] = {"sample_sizes": SIZES, "candidates": CANDIDATES, "micro_batch_size": 3}
    module, data, _, _ = classifier_case()
    monitor = StabilizationMonitor(**(defaults | options))
    return monitor.evaluate(module, DataLoader(data, batch_size=7), trainer=make_trainer()).result


def rows_multiplied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many vectors are multiplied at once with a single sample."""
    counts: list[int] = []
    real = exact.products_with
    monkeypatch.setattr(exact, "products_with", lambda *args: counts.append(len(args[-1])) or real(*args))
    return counts


def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Samples that each product with a mean Hessian goes through."""
    counts: list[int] = []
    real = HessianOperator.product_of

    def counted(self: HessianOperator, index: int, vectors: Any) -> Any:
        counts.append(index)
        return real(self, index, vectors)

    monkeypatch.setattr(HessianOperator, "product_of", counted)
    return counts


@pytest.mark.parametrize("dimension", [1, 5])
def test_each_new_sample_takes_as_many_products_as_there_are_directions(
    dimension: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the one sample alone: those with the means over k and k + 1 would be D more of each."""
    with_samples, with_means = rows_multiplied(monkeypatch), products(monkeypatch)
    growth = measured(quantities=("delta_2_subspace",), subspace_dim=dimension, validation_draws=0)
    assert with_samples == [dimension] * CANDIDATES * len(SIZES)
    # One micro-batch at k = 2, two at k = 6: the eigensolver's, and no others.
    assert with_means.count(0) == growth.products


def test_traces_go_through_each_sample_once_a_vector(monkeypatch: pytest.MonkeyPatch) -> None:
    with_samples, with_means = rows_multiplied(monkeypatch), products(monkeypatch)
    measured(quantities=("delta_2",), trace_vectors=4, sigma=(0.1, 0.2), validation_draws=0)
    assert sum(with_samples) == 4 * CANDIDATES * len(SIZES)
    # Samples 0 and 1 in one micro-batch, 2 to 5 in two: not 0 to 5 once more.
    assert sorted(with_means) == [0] * 8 + [1] * 4


def test_the_model_of_the_full_space_takes_a_product_a_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """With all samples, once for all k and σ; those that it is compared on are among the draws."""
    with_samples, with_means = rows_multiplied(monkeypatch), products(monkeypatch)
    measured(quantities=("delta_2",), estimators=("quadratic",), draws=5, sigma=(0.1, 0.2), validation_draws=3)
    assert sum(with_samples) == 5 * CANDIDATES * len(SIZES)
    assert sorted(with_means) == [0] * 10 + [1] * 5


def test_the_value_alone_takes_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    with_samples, with_means = rows_multiplied(monkeypatch), products(monkeypatch)
    backward: list[int] = []
    real = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kw: backward.append(1) or real(*args, **kw))
    measured(quantities=("delta_1",))
    assert with_samples == with_means == backward == []
    measured(quantities=("delta_1", "delta_2"), estimators=("direct",), draws=3)
    assert with_samples == with_means == backward == []


def test_forwards_of_direct_monte_carlo(monkeypatch: pytest.MonkeyPatch) -> None:
    """Per draw, D and σ: the micro-batches of the first k, and those of the new samples."""
    draws = 5

    def forwards(**options: Any) -> int:
        module, data, _, _ = classifier_case()
        passes: list[int] = []
        on_forward(module.network, lambda *args: passes.append(1))
        StabilizationMonitor(
            sample_sizes=SIZES, candidates=CANDIDATES, micro_batch_size=3, draws=draws, validation_draws=0, **options
        ).evaluate(module, DataLoader(data, batch_size=7), trainer=make_trainer())
        return len(passes)

    options: dict[str, Any] = {"quantities": ("delta_2_subspace",), "subspace_dim": (1, 2), "sigma": (0.1, 0.2, 0.3)}
    before = forwards(estimators=("quadratic",), **options)
    # k = 2: one micro-batch; k = 6: two. New samples: 3 + 1. Those that were stacked before are checked no more.
    expected = draws * 2 * 3 * ((1 + 2) + (2 + 2))
    extra = forwards(estimators=("quadratic", "direct"), **options) - before
    assert expected <= extra <= expected + 4
    full = {"quantities": ("delta_2",), "sigma": (0.1, 0.2, 0.3)}
    extra = forwards(estimators=("direct",), **full) - forwards(quantities=("delta_1",))
    # All ten samples in four micro-batches serve both k.
    assert draws * 3 * 4 <= extra <= draws * 3 * 4 + 4


def test_no_copies_of_the_model_for_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor is that of the basis, whatever S is."""
    sizes: list[int] = []
    real = torch.Tensor.clone

    def noted(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        sizes.append(self.numel())
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "clone", noted)
    few: dict[str, Any] = {"quantities": ("delta_2_subspace",), "subspace_dim": 2, "estimators": ("direct",)}
    measured(draws=3, **few)
    largest, count = max(sizes), len(sizes)
    sizes.clear()
    measured(draws=60, **few)
    assert max(sizes) == largest
    assert len(sizes) > count
