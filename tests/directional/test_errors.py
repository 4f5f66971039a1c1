"""Every mistake gets one sentence: argument, rule, what was given, what to do. What training survives, it survives."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_curvature import DirectionalCurvatureMonitor
from tests.helpers.directional import monitor, regression
from tests.helpers.modules import Plain, sgd
from tests.helpers.runs import Batch, Capture, classification, loader, make_trainer, run, warned

BAD_ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    *(
        ({"epsilon": value}, rf"epsilon must be positive and finite, or 'auto', got {value!r}: 1\.0 is as far as")
        for value in (0.0, -1.0, math.nan, math.inf, "0.1")
    ),
    ({"estimators": ["kl", "lanczos"]}, r"estimators must be names from .*'kl'.*, got 'lanczos': correct or remove it"),
    ({"estimators": "kl"}, r"estimators must be a non-empty sequence of names, got 'kl': choose from .*'hvp'"),
    ({"estimators": []}, r"estimators must be a non-empty sequence of names, got \[\]: choose from .*'hvp'"),
    ({"every_n_train_steps": 0}, r"every_n_train_steps must be a whole number of at least 1, got 0: 1 measures every"),
    ({"every_n_train_steps": 2.5}, r"every_n_train_steps must be a whole number of at least 1, got 2\.5"),
    ({"every_n_train_steps": "10"}, r"every_n_train_steps must be a whole number of at least 1, got '10'"),
    ({"epsilon": None}, r"epsilon must be positive and finite, or 'auto', got None"),
    ({"every_n_train_steps": -5}, r"every_n_train_steps must be a whole number of at least 1, got -5"),
    ({"on_error": "ignore"}, r"on_error must be 'warn' or 'raise', got 'ignore': 'warn' lets training go on"),
    ({"likelihood": "poisson"}, r"likelihood must be 'auto', .*'gaussian'.*, got 'poisson': name the one"),
    ({"probe_precision": "64"}, r"probe_precision must be '32-true' or None, got '64': None computes in the run's"),
    ({"prefix": ""}, r"prefix must be a name without slashes at its ends, got '': use 'curvature'"),
    ({"prefix": "train/"}, r"prefix must be a name without slashes at its ends, got 'train/': use 'curvature'"),
    ({"optimizer_index": -1}, r"optimizer_index must not be negative, got -1: 0 is the first optimizer"),
    (
        {"critical_max_forwards": 2},
        r"critical_max_forwards must be a whole number of at least 3, got 2: a bracket alone takes two",
    ),
]


@pytest.mark.parametrize(("arguments", "sentence"), BAD_ARGUMENTS, ids=lambda value: str(value)[:40])
def test_bad_arguments(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        DirectionalCurvatureMonitor(**arguments)
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


def test_arguments_are_keyword_only() -> None:
    with pytest.raises(TypeError):
        DirectionalCurvatureMonitor(("kl",))  # type: ignore[misc]


class TwoOptimizers(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [sgd(self.network[0]), sgd(self.network[2])]

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        loss = self.loss(self(batch[0]), batch[1])
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()


class FromIterator(Plain):
    def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
        batch, _, _ = next(dataloader_iter)
        return self.loss(self(batch[0]), batch[1])


MISFITS: dict[str, tuple[Callable[[], pl.LightningModule], dict[str, Any], dict[str, Any], type[Exception], str]] = {
    "several optimizers": (
        TwoOptimizers,
        {},
        {},
        MisconfigurationException,
        r"needs objective= where several optimizers .*, got 2 optimizers: give a callable \(module, batch\) -> loss",
    ),
    "optimizer that is not there": (
        Plain,
        {"optimizer_index": 1},
        {},
        MisconfigurationException,
        r"optimizer_index must be below the number of optimizers, got 1 of 1: count from 0",
    ),
    "step that fetches its own batch": (
        FromIterator,
        {},
        {},
        MisconfigurationException,
        r"must see the batch of a step, got training_step\(dataloader_iter\): take \(batch, batch_idx\) instead",
    ),
    "outputs that name nothing": (
        Plain,
        {"outputs": "head"},
        {},
        ValueError,
        r"outputs must name a submodule of Plain, got 'head': choose one of \['network', 'network.0'",
    ),
    "float32 evaluations of half-precision parameters": (
        Plain,
        {"probe_precision": "32-true"},
        {"precision": "bf16-true"},
        MisconfigurationException,
        r"probe_precision='32-true' needs float32 parameters, got half-precision ones: train with a '-mixed' precision",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_misfits_are_found_before_the_first_step(name: str) -> None:
    make, options, trainer_options, kind, sentence = MISFITS[name]
    module = make()
    trainer = make_trainer(monitor(**options), **trainer_options)
    with pytest.raises(kind, match=sentence):
        trainer.fit(module, loader(classification(2)))
    assert module.seen == 0
    assert trainer.global_step == 0


def test_one_prefix_for_two_monitors() -> None:
    with pytest.raises(RuntimeError, match="state_key` must be unique"):  # Lightning's own words, already in Trainer()
        make_trainer(monitor(prefix="a"), monitor(prefix="a"))
    trainer = make_trainer(monitor(prefix="a"))
    trainer.callbacks.append(monitor(prefix="a", estimators=["hvp"]))  # type: ignore[attr-defined]
    sentence = r"prefix must differ between monitors of one class, got 'a' of two \w+s: give one of them another prefix"
    with pytest.raises(MisconfigurationException, match=sentence):
        trainer.fit(Plain(), loader(classification(1)))


def test_several_optimizers_with_an_objective() -> None:
    module, capture = TwoOptimizers(), Capture()
    follow = monitor(
        objective=lambda m, batch: F.cross_entropy(m(batch[0]), batch[1]), estimators=["finite_difference"]
    )
    make_trainer(follow, logger=capture).fit(module, loader(classification(2)))
    assert all(math.isfinite(v) for v in capture.curve("curvature/lambda_fd"))
    assert len(capture.curve("curvature/lambda_fd")) > 0


class Hidden(Plain):
    """Its outputs never leave training_step."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.loss(self.network(batch[0]), batch[1])


@pytest.mark.parametrize("estimators", [("kl",), ("gauss_newton",), ("kl", "finite_difference", "hvp")])
def test_kl_by_name_without_outputs_names_the_three_ways(estimators: tuple[str, ...]) -> None:
    with pytest.raises(MisconfigurationException) as caught:
        run(Hidden(), classification(2), monitor(estimators=estimators))
    sentence = str(caught.value)
    for way in (
        "return them from training_step as {'loss': …, 'outputs': …}",
        "calling self(…) exactly once",
        "outputs='head'",
    ):
        assert way in sentence


def test_the_default_pair_goes_on_without_outputs() -> None:
    found: list[Any] = []
    messages = warned(lambda: found.append(run(Hidden(), classification(3), monitor())))
    assert len(messages) == 1
    assert "['kl'] need the outputs of the model, got none" in messages[0]
    assert messages[0].endswith("Going on with 'finite_difference' alone.")
    capture = found[0].capture
    assert len(capture.curve("curvature/lambda_fd")) == 3
    assert all(math.isfinite(v) for v in capture.curve("curvature/lambda_fd"))
    assert capture.curve("curvature/lambda_kl") == []


def penalized(z: Tensor, y: Tensor) -> Tensor:
    """A loss that belongs to no likelihood the batch could tell."""
    return (z - y).square().mean() + z.abs().mean()


def test_a_likelihood_that_cannot_be_read_is_asked_for() -> None:
    sentence = r"likelihood='auto' could not read off the batch: name it, likelihood='categorical', 'gaussian' or"
    with pytest.raises(MisconfigurationException, match=sentence):
        run(Plain(loss=penalized), regression(2), monitor(estimators=["kl"]))
    messages = warned(lambda: run(Plain(loss=penalized), regression(2), monitor()))
    assert len(messages) == 1
    assert "name it, likelihood=" in messages[0]
    outcome = run(Plain(loss=penalized), regression(2), monitor(estimators=["kl"], likelihood="gaussian"))
    assert all(v > 0 for v in outcome.capture.curve("curvature/lambda_kl"))


def test_validation_alone_is_left_alone() -> None:
    class Validated(Plain):
        def validation_step(self, batch: Batch, batch_idx: int) -> None:
            self.log("val_loss", self.loss(self(batch[0]), batch[1]))

    trainer = make_trainer(monitor(on_error="raise"))
    (metrics,) = trainer.validate(Validated(), loader(classification(2)), verbose=False)
    assert list(metrics) == ["val_loss"]
