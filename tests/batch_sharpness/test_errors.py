"""Every mistake gets one sentence, before the first step; what cannot be measured is NaN and said once."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

from lightning_curvature.batch_sharpness.options import OF_UPDATES, QUANTITIES
from tests.helpers.batch_sharpness import DRAWN, loader, monitor, sgd
from tests.helpers.modules import Plain
from tests.helpers.runs import Batch, Capture, Classifier, make_trainer, mlp, rows, warned


def lbfgs(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(module.parameters(), lr=0.1)


@pytest.mark.slow
def test_a_closure_is_no_hindrance_to_the_others() -> None:
    capture = Capture()
    others = [name for name in QUANTITIES if name not in OF_UPDATES]
    make_trainer(monitor(*others), logger=capture).fit(Plain(mlp(4, 3, 3), lbfgs), loader())
    for row in rows(capture).values():
        assert all(math.isfinite(row[name]) for name in others)


def fitted(module: Any, follow: Any, steps: int = 4) -> tuple[dict[int, dict[str, float]], list[str]]:
    """Rows, and what was said; training goes on to its end."""
    capture = Capture()
    trainer = make_trainer(follow, logger=capture)
    said = warned(lambda: trainer.fit(module, loader()))
    assert trainer.global_step == steps
    return rows(capture), said


def lost(row: dict[str, float]) -> set[str]:
    return {key for key, value in row.items() if math.isnan(value)}


@pytest.mark.slow
def test_outputs_that_are_missing_stop_the_gauss_newton_matrix() -> None:
    class Hidden(Classifier):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            return self.loss(self.network(batch[0]), batch[1])

    follow = monitor(*QUANTITIES, curvature="gauss_newton", on_error="warn")
    found, said = fitted(Hidden(mlp(4, 3, 3), sgd), follow)
    for row in found.values():
        assert lost(row) == set(row) - {"two_over_lr"}
    sentence = (
        "ValueError: outputs must come with the loss, in its graph, got none: compute them by calling self(…) exactly "
        "once, or name the submodule that makes them, outputs='head'."
    )
    assert said == [
        f"BatchSharpnessMonitor logs NaN: {sentence}",
        f"BatchSharpnessMonitor must make the measurements that are due, got 0 of 2: {sentence}",
    ]
    remedied = monitor(*QUANTITIES, curvature="gauss_newton", outputs="network")
    found, said = fitted(Hidden(mlp(4, 3, 3), sgd), remedied)
    assert said == []
    assert all(lost(row) == {"step_sharpness_stderr"} for row in found.values())


def test_a_loss_that_is_nan() -> None:
    module = Classifier(mlp(4, 3, 3), sgd, lambda z, y: F.cross_entropy(z, y) * math.nan)
    found, said = fitted(module, monitor(*QUANTITIES, on_error="warn"))
    assert list(found) == [0, 2]
    for row in found.values():
        assert lost(row) == set(row) - {"two_over_lr"}
    # The step's own batch and ∇L; an eigenvalue of a mini-batch.
    *said, end = said
    assert end.startswith("BatchSharpnessMonitor must make the measurements that are due, got 0 of 2: NonFiniteProduct")
    assert said == [
        "BatchSharpnessMonitor logs NaN: ArithmeticError: the loss of a mini-batch and its derivatives must be finite, "
        "got nan: look at the loss there.",
        "BatchSharpnessMonitor logs NaN: NonFiniteProductError: a product with the operator must be finite, got NaN or "
        "infinity in product 1: look at the loss and its gradient there.",
    ]


@pytest.mark.parametrize("name", QUANTITIES)
def test_each_quantity_raises_if_asked_to(name: str) -> None:
    module = Plain(mlp(4, 3, 3), sgd, lambda z, y: F.cross_entropy(z, y) * math.nan)
    trainer = make_trainer(monitor(name, on_error="raise"))
    with pytest.raises(ArithmeticError, match=r"must be finite, got (nan|NaN)"):
        trainer.fit(module, loader())
    assert module.seen == 0


def test_no_gradient_at_all_is_said_once() -> None:
    """All samples are fitted: the loss is 0 and flat."""
    module = Classifier(mlp(4, 3, 3), sgd, lambda z, y: F.relu(z - 100.0).mean())
    found, said = fitted(module, monitor(*QUANTITIES, on_error="warn"))
    for row in found.values():
        assert row["zero_gradient_batches"] == 24.0
        assert row["lambda_max_b"] == 0.0
        for name in (*DRAWN, "step_sharpness"):
            assert math.isnan(row[name]) == (name != "lambda_max_b"), name
    assert said == [
        "no mini-batch that was drawn has a gradient, and sharpness along it is not defined: all samples are fitted, "
        "or the loss is constant."
    ]


@pytest.mark.parametrize("name", ["gni", "lambda_gen"])
def test_unequal_weights_have_no_full_gradient(name: str) -> None:
    data = TensorDataset(torch.randn(12, 4).double(), torch.zeros(12, dtype=torch.long))
    weighted = DataLoader(data, batch_size=4, sampler=WeightedRandomSampler([1.0, 10.0] * 6, 12))
    module = Classifier(mlp(4, 5, 3), sgd)
    with pytest.raises(MisconfigurationException, match=f"quantities must not hold '{name}' where samples are drawn"):
        make_trainer(monitor(name, "batch_sharpness")).fit(module, weighted)
    alike = DataLoader(data, batch_size=4, sampler=WeightedRandomSampler([2.0] * 12, 12))
    make_trainer(monitor(name, "batch_sharpness")).fit(Classifier(mlp(4, 5, 3), sgd), alike)
