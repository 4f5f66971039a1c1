"""Step sharpness: of the very gradient that the step has, masks and accumulation included."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from tests.helpers.batch_sharpness import EXACT, Dense, fit, learner, loader, monitor, samples, sgd
from tests.helpers.runs import Classifier, StepRecorder, make_trainer, mlp
from tests.oracles.hessian_spectrum import Curvature, Part


class Gradients(pl.Callback):
    """Notes the gradient of each step, flat, and which samples it saw."""

    def __init__(self) -> None:
        self.all: list[Tensor] = []
        self.batches: list[list[list[int]]] = []
        self._open: list[list[int]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        x, _ = samples()
        self._open.append([int((x == row).all(dim=1).nonzero()) for row in batch[0]])

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.all.append(torch.cat([p.grad.reshape(-1) for p in pl_module.network.parameters()]))
        self.batches.append(self._open)
        self._open = []


def dropping() -> Classifier:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 5), nn.Dropout(0.4), nn.Tanh(), nn.Linear(5, 3)]
    return Classifier(nn.Sequential(*layers).double(), lambda m: torch.optim.SGD(m.parameters(), lr=0.3, momentum=0.5))


@pytest.mark.parametrize("kind", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.thinned(6)
def test_of_the_gradient_that_the_step_has(accumulate: int, kind: Any) -> None:
    """Batches of 4, 4, 4 and 2: the last window is ragged, or not full."""
    torch.manual_seed(5)
    recorder, gradients = StepRecorder(), Gradients()
    # Mini-batches that are drawn before it, a few.
    follow = monitor("step_sharpness", "ias", curvature=kind, every_n_train_steps=1, num_batches=4)
    module = dropping()
    # Behind the monitor nobody draws before the step does.
    run = fit(follow, module, max_epochs=2, accumulate_grad_batches=accumulate, callbacks_before=[recorder, gradients])
    steps = 2 * math.ceil(4 / accumulate)
    assert list(run.rows) == list(range(steps))
    for step, row in run.rows.items():
        curvature = Curvature(module.network, module.loss, run.moment(step))
        parts = recorder.steps[step].parts
        assert len(parts) == len(gradients.batches[step])
        # Lightning weights the batches of a window alike, also a ragged one.
        matrices = [getattr(curvature, kind)([Part(part.x, part.y, part.rng)]) for part in parts]
        matrix, g = torch.stack(matrices).mean(dim=0), gradients.all[step]
        assert row["step_sharpness"] == pytest.approx(float(g @ matrix @ g / (g @ g)), rel=EXACT), step
        assert math.isnan(row["step_sharpness_stderr"])
        assert "step_sharpness_batches" not in row


@pytest.mark.parametrize("shuffle", [True, False])
def test_its_mean_over_an_epoch_is_batch_sharpness(shuffle: bool) -> None:
    """At fixed parameters, over the mini-batches that the epoch is cut into."""
    torch.manual_seed(6)
    gradients = Gradients()
    still = learner(lambda m: torch.optim.SGD(m.parameters(), lr=0.0))
    follow = monitor("step_sharpness", every_n_train_steps=1)
    run = fit(follow, still, loader(shuffle=shuffle, drop_last=True), callbacks_before=[gradients])
    dense = Dense(Curvature(still.network, still.loss, run.moment(0)))
    batches = [batch for step in gradients.batches for batch in step]
    assert len(batches) == 3
    sharpness = dense.terms("batch_sharpness", batches)
    assert sum(row["step_sharpness"] for row in run.rows.values()) / 3 == pytest.approx(
        sum(float(x) for x, _ in sharpness) / 3, rel=EXACT
    )


def test_a_step_that_writes_into_its_batch() -> None:
    class Writing(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step((batch[0] * 1.0, batch[1]), batch_idx)
            batch[0].zero_()
            return loss

    def rows(kind: Any) -> Any:
        torch.manual_seed(7)
        follow = monitor("step_sharpness", every_n_train_steps=1)
        return fit(follow, kind(mlp(4, 3, 3), sgd), accumulate_grad_batches=2).rows

    assert str(rows(Writing)) == str(rows(Classifier))  # NaN of the standard error, too


def test_batches_are_kept_for_a_step_and_no_longer() -> None:
    follow = monitor("step_sharpness")
    kept: list[int] = []

    class Looking(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            kept.append(len(follow._calls))

    make_trainer(follow, Looking(), accumulate_grad_batches=2, max_epochs=2).fit(learner(), loader())
    # Steps 0 and 2 are measured, of two batches each.
    assert kept == [1, 0, 0, 0, 1, 0, 0, 0]
