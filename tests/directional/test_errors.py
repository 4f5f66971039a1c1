"""What only a batch shows: several losses, no outputs, no likelihood. Training survives what it can."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from tests.helpers.directional import monitor, regression
from tests.helpers.modules import Plain, TwoOptimizers
from tests.helpers.runs import Batch, Capture, classification, loader, make_trainer, run, warned


class Steps(TwoOptimizers):
    """Steps both optimizers."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        loss = self.loss(self(batch[0]), batch[1])
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()


def test_several_optimizers_with_an_objective() -> None:
    module, capture = Steps(), Capture()
    follow = monitor(
        objective=lambda m, batch: F.cross_entropy(m(batch[0]), batch[1]), estimators=["finite_difference"]
    )
    make_trainer(follow, logger=capture).fit(module, loader(classification(2)))
    assert all(math.isfinite(v) for v in capture.curve("curvature/lambda_fd"))
    assert len(capture.curve("curvature/lambda_fd")) > 0


class Hidden(Plain):
    """Makes its outputs of parameters, without a module."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        z = batch[0]
        for layer in self.network:
            z = F.linear(z, layer.weight, layer.bias) if isinstance(layer, nn.Linear) else z.tanh()
        return self.loss(z, batch[1])


@pytest.mark.parametrize("estimators", [("kl",), ("gauss_newton",), ("kl", "gauss_newton")])
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


def test_others_go_on_without_outputs() -> None:
    follow = monitor(estimators=("kl", "hvp", "gauss_newton", "critical"))
    (message,) = warned(lambda: run(Hidden(), classification(2), follow))
    assert message.endswith("Going on with 'hvp', 'critical' alone.")
    assert {"lambda_dir", "critical_sharpness"} <= follow.result.values().keys()
    assert math.isfinite(follow.result.values()["lambda_dir"])


def margin(z: Tensor, y: Tensor) -> Tensor:
    """A loss that belongs to no likelihood the batch could tell, and has no second derivative by the outputs."""
    labels = y.argmax(-1) if y.ndim > 1 else (y > 0).long()
    return F.multi_margin_loss(z.expand(-1, 2) if z.shape[-1] == 1 else z, labels, p=2)


def test_a_likelihood_that_cannot_be_read_is_asked_for() -> None:
    sentence = r"likelihood='auto' could not read off the batch: name it, likelihood='categorical', 'gaussian' or"
    with pytest.raises(MisconfigurationException, match=sentence):
        run(Plain(loss=margin), regression(2), monitor(estimators=["kl"]))
    messages = warned(lambda: run(Plain(loss=margin), regression(2), monitor()))
    assert len(messages) == 1
    assert "name it, likelihood=" in messages[0]
    named = monitor(estimators=["kl"], likelihood="gaussian")
    outcome = run(Plain(loss=margin), regression(2), named)
    assert all(math.isnan(v) for v in outcome.capture.curve("curvature/lambda_kl"))
    assert "or the loss is another" in named.result.reasons["lambda_kl"]


def test_validation_alone_is_left_alone() -> None:
    class Validated(Plain):
        def validation_step(self, batch: Batch, batch_idx: int) -> None:
            self.log("val_loss", self.loss(self(batch[0]), batch[1]))

    trainer = make_trainer(monitor(on_error="raise"))
    (metrics,) = trainer.validate(Validated(), loader(classification(2)), verbose=False)
    assert list(metrics) == ["val_loss"]
