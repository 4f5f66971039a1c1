"""A run that goes on from a checkpoint logs what the unbroken run does, bit for bit."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_curvature.batch_sharpness.options import QUANTITIES
from tests.helpers.batch_sharpness import monitor, samples
from tests.helpers.runs import Capture, Classifier, make_trainer, mlp, rows


def fit(epochs: int, resume: str | None = None, **options: Any) -> tuple[pl.Trainer, dict[int, dict[str, float]]]:
    capture = Capture()
    follow = monitor(*QUANTITIES, **({"num_batches": 8} | options.pop("monitor", {})))
    trainer = make_trainer(follow, logger=capture, max_epochs=epochs, **options)
    learner = Classifier(mlp(4, 3, 3), lambda m: torch.optim.Adam(m.parameters(), lr=0.03))
    # In order: which samples come next is then no matter of random states, which a checkpoint does not hold.
    trainer.fit(learner, DataLoader(TensorDataset(*samples()), batch_size=4), ckpt_path=resume)
    return trainer, rows(capture)


def test_other_draws_at_other_steps_and_with_other_seeds() -> None:
    still: Any = {"every_n_train_steps": 1}
    _, one = fit(1, monitor=still)
    _, other = fit(1, monitor=still | {"seed": 1})
    assert list(one) == list(other) == [0, 1, 2, 3]
    # The step's own batch is none of the draws.
    assert one[0]["step_sharpness"] == other[0]["step_sharpness"]
    assert one[0]["batch_sharpness"] != other[0]["batch_sharpness"]
    _, again = fit(1, monitor=still)
    assert str(again) == str(one)


def test_a_monitor_in_a_second_fit_begins_anew() -> None:
    def run(follow: Any, data: Any) -> dict[int, dict[str, float]]:
        capture, learner = Capture(), Classifier(mlp(4, 3, 3), lambda m: torch.optim.SGD(m.parameters(), lr=0.3))
        make_trainer(follow, logger=capture).fit(learner, data)
        return rows(capture)

    x, y = samples()
    first, second = (DataLoader(TensorDataset(x * scale, y), batch_size=4) for scale in (1.0, 2.0))
    few = {"num_batches": 8}
    follow = monitor(*QUANTITIES, **few)
    run(follow, first)
    assert str(run(follow, second)) == str(run(monitor(*QUANTITIES, **few), second))
    assert str(run(follow, first)) != str(run(follow, second))
