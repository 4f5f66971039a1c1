"""Every mistake gets one sentence, before the first step: argument, rule, what was given, what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_curvature import HessianSpectrumMonitor
from tests.helpers.modules import Plain
from tests.helpers.runs import Batch, Capture, batched_samples, classification, loader, make_trainer, warned


def monitor(*quantities: str, **options: Any) -> HessianSpectrumMonitor:
    given: Any = quantities or ("lambda_max",)
    return HessianSpectrumMonitor(**({"quantities": given, "every_n_train_steps": 1} | options))


@pytest.mark.parametrize("name", ["Adadelta", "LBFGS"])
def test_unknown_optimizer_gets_two_over_the_rate_and_one_note(name: str) -> None:
    capture = Capture()
    options = {"max_iter": 1} if name == "LBFGS" else {}
    make = lambda m: getattr(torch.optim, name)(m.parameters(), lr=0.25, **options)  # noqa: E731
    trainer = make_trainer(monitor(), logger=capture, max_epochs=2)
    assert warned(lambda: trainer.fit(Plain(make_optimizer=make), batched_samples())) == [
        f"{name} is not known: 2/η of gradient descent is drawn."
    ]
    assert capture.curve("curvature/lambda_max_threshold") == [8.0] * 4


def test_validation_alone_is_left_alone() -> None:
    class Validated(Plain):
        def validation_step(self, batch: Batch, batch_idx: int) -> None:
            self.log("val_loss", self.loss(self(batch[0]), batch[1]))

    trainer = make_trainer(monitor(on_error="raise"))
    (metrics,) = trainer.validate(Validated(), loader(classification(2)), verbose=False)
    assert list(metrics) == ["val_loss"]
