"""Every mistake gets one sentence, before the first step; what cannot be measured is NaN and said once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import LambdaCallback
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

from lightning_curvature import BatchSharpnessMonitor
from lightning_curvature.batch_sharpness.options import QUANTITIES
from tests.helpers.batch_sharpness import DRAWN, Stream, loader, monitor, sgd, whole_batches
from tests.helpers.modules import Plain, sharded
from tests.helpers.runs import Batch, Capture, Classifier, make_trainer, mlp, rows, warned

WHOLE = "must be a whole number of at least"
BAD_ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"quantities": "ias"}, r"quantities must be a non-empty sequence of names, got 'ias': choose from \('batch_sharp"),
    ({"quantities": []}, r"quantities must be a non-empty sequence of names, got \[\]: choose from"),
    (
        {"quantities": ["gni", "lambda_max"]},
        r"quantities must be names from .*'lambda_max_b'.*, got 'lambda_max': correct or remove it",
    ),
    ({"min_batches": 3}, rf"min_batches {WHOLE} 4, got 3: 16 make a standard error that can be trusted"),
    ({"min_batches": 16.0}, rf"min_batches {WHOLE} 4, got 16\.0"),
    ({"num_batches": 8}, rf"num_batches {WHOLE} 16, got 8: it is the most, min_batches the fewest"),
    ({"num_batches": 20, "min_batches": 24}, rf"num_batches {WHOLE} 24, got 20"),
    ({"batch_size": 0}, rf"batch_size {WHOLE} 1, or None, got 0: None takes the data of one optimizer step"),
    *(
        ({"relative_error": value}, rf"relative_error must lie between 0 and 1, got {value!r}: 0\.05 gives values to 5")
        for value in (0.0, 1.0, -0.1, float("nan"), "0.1")
    ),
    ({"tolerance": 0.0}, r"tolerance must lie between 0 and 1, got 0\.0: 1e-2 gives eigenvalues to three digits or so"),
    (
        {"curvature": "fisher"},
        r"curvature must be one of \('hessian', 'gauss_newton'\), got 'fisher': 'hessian' is the whole",
    ),
    ({"full_hessian": "whole"}, r"full_hessian must be 'pairs' or 'exact', got 'whole': 'pairs' is the one for large"),
    ({"probe_samples": 0}, rf"probe_samples {WHOLE} 1, or None, got 0: None takes all training data"),
    ({"micro_batch_size": 0}, rf"micro_batch_size {WHOLE} 1, or None, got 0: None takes the batch size of the loader"),
    ({"probe_mode": "test"}, r"probe_mode must be 'train' or 'eval', got 'test'"),
    ({"every_n_train_steps": 0}, rf"every_n_train_steps {WHOLE} 1, got 0: 1 measures every optimizer step"),
    ({"on_error": "ignore"}, r"on_error must be 'warn' or 'raise', got 'ignore': 'warn' lets training go on"),
    ({"prefix": ""}, r"prefix must be a name without slashes at its ends, got '': use 'curvature'"),
]


@pytest.mark.parametrize(("arguments", "sentence"), BAD_ARGUMENTS, ids=lambda value: str(value)[:40])
def test_bad_arguments(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        BatchSharpnessMonitor(**arguments)
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


def test_arguments_are_keyword_only() -> None:
    with pytest.raises(TypeError):
        BatchSharpnessMonitor(("ias",))  # type: ignore[misc]


def lbfgs(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(module.parameters(), lr=0.1)


MISFITS: dict[str, tuple[Any, BatchSharpnessMonitor, Callable[[], Any], str]] = {
    "closure": (
        lbfgs,
        monitor("ias", "lambda_gen"),
        loader,
        r"optimizer must step on gradients alone for trial updates, got LBFGS, whose step needs closure: train with "
        r"another optimizer, or leave 'lambda_gen' out",
    ),
    "shards": (
        sharded,
        monitor("batch_sharpness"),
        loader,
        r"parameters must be whole, or sharded by FSDP2's fully_shard alone, for BatchSharpnessMonitor, got "
        r"'network.2.weight' as a DTensor of another kind",
    ),
    "more than there is": (
        sgd,
        monitor(batch_size=15),
        loader,
        r"batch_size must be at most the 14 samples that are drawn from without replacement, got 15: lower it, or "
        r"raise probe_samples",
    ),
    "more than the subset": (
        sgd,
        monitor(probe_samples=3),
        loader,
        r"at most the 3 samples that are drawn from without replacement, got 4 \(an optimizer step\): lower it",
    ),
    "size of whole batches": (
        sgd,
        monitor(batch_size=3),
        whole_batches,
        r"batch_size must be left to a dataloader that hands out whole batches, got 3: leave it out",
    ),
    "stream without end": (
        sgd,
        monitor(probe_samples=None),
        lambda: torch.utils.data.DataLoader(Stream(), batch_size=4),
        r"samples must be a number where the dataloader has no length, got None: say how many to measure on",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_misfits_are_found_before_the_first_step(name: str) -> None:
    """Also with on_error="warn", for these last as long as the run."""
    make, follow, data, sentence = MISFITS[name]
    follow.options = dataclasses.replace(follow.options, on_error="warn")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        module, started = Plain(mlp(4, 3, 3), make), list[int]()
        trainer = make_trainer(follow, LambdaCallback(on_train_start=lambda *args: started.append(1)))
        with pytest.raises((MisconfigurationException, ValueError), match=sentence) as caught:
            trainer.fit(module, data())
    finally:
        dist.destroy_process_group()
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)
    assert module.seen == 0
    # What the optimizer tells is found before any data is read.
    assert started == ([] if name in ("closure", "shards") else [1])


def test_a_closure_is_no_hindrance_to_the_others() -> None:
    capture = Capture()
    others = [name for name in QUANTITIES if name != "lambda_gen"]
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


def test_outputs_that_are_missing_stop_the_gauss_newton_matrix() -> None:
    class Hidden(Classifier):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            return self.loss(self.network(batch[0]), batch[1])

    follow = monitor(*QUANTITIES, curvature="gauss_newton", on_error="warn")
    found, said = fitted(Hidden(mlp(4, 3, 3), sgd), follow)
    for row in found.values():
        assert lost(row) == set(row) - {"two_over_lr"}
    assert said == [
        "BatchSharpnessMonitor logs NaN: ValueError: outputs must come with the loss, in its graph, got none: compute "
        "them by calling self(…) exactly once, or name the submodule that makes them, outputs='head'."
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
