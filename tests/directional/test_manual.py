"""Manual optimization against the dense oracle: the loss is what training_step hands to ``manual_backward``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_curvature import DirectionalCurvatureMonitor
from tests.helpers.manual import Manual, momentum
from tests.helpers.runs import (
    Batch,
    Capture,
    MakeOptimizer,
    StepRecorder,
    classification,
    loader,
    make_trainer,
    mlp,
    own,
    run,
)
from tests.helpers.setups import regression
from tests.oracles.along_step import check, check_row, monitors, rows_of
from tests.oracles.dense import reference


def adamw(m: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(m.parameters(), lr=0.05, weight_decay=0.5)


def dropout() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3)).double()


@pytest.mark.parametrize("clip", [None, "norm", "value"])
@pytest.mark.parametrize("make", [momentum, adamw])
@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.thinned(4)
def test_steps_by_hand(window: int, make: MakeOptimizer, clip: str | None) -> None:
    outcome = run(Manual(mlp(4, 6, 3), make, window, clip), classification(2 * window), *monitors())
    assert [len(step.parts) for step in outcome.steps] == [window] * 2
    check(outcome, steps=2)


@pytest.mark.parametrize("window", [1, 2])
def test_dropout_by_hand(window: int) -> None:
    check(run(Manual(dropout(), momentum, window), classification(2 * window), *monitors()), steps=2)


def test_a_scheduler_stepped_by_hand() -> None:
    def scheduled(m: nn.Module) -> Any:
        optimizer = torch.optim.SGD(m.parameters(), lr=0.4)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)]

    outcome = run(Manual(mlp(4, 6, 3), scheduled), classification(3), *monitors())
    check(outcome, steps=3)
    assert [row["two_over_lr"] for row in rows_of(outcome)] == pytest.approx([5.0, 10.0, 20.0], rel=1e-12)


class ManualRegression(Manual):
    """Squared error, whose likelihood must be found from the loss."""

    def __init__(self, window: int) -> None:
        super().__init__(mlp(4, 6, 3), momentum, window)
        self.loss = F.mse_loss


@pytest.mark.parametrize("window", [1, 3])
def test_squared_error_by_hand(window: int) -> None:
    check(run(ManualRegression(window), regression(2 * window), *monitors()), steps=2)


class InParts(Manual):
    """Two calls of backward before one step: the loss is their sum."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        z = self(batch[0])
        for half in (slice(0, 4), slice(4, 8)):
            self.manual_backward(0.5 * self.loss(z[half], batch[1][half]), retain_graph=True)
        optimizer.step()


def test_a_loss_handed_over_in_parts() -> None:
    check(run(InParts(mlp(4, 6, 3), momentum), classification(3), *monitors()), steps=3)


class WithClosure(Manual):
    """LBFGS by hand evaluates the loss several times in one step."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss(self.network(batch[0]), batch[1])
            self.manual_backward(loss)
            return loss

        self(batch[0])
        optimizer.step(closure)


def test_lbfgs_by_hand() -> None:
    search: Callable[[nn.Module], Any] = lambda m: torch.optim.LBFGS(  # noqa: E731
        m.parameters(), max_iter=3, line_search_fn="strong_wolfe"
    )
    check(run(WithClosure(mlp(4, 6, 3), search), classification(3), *monitors()), steps=3)


class Twice(Manual):
    """Two optimizer steps on each batch, the second on another loss."""

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        for weight in (1.0, 0.5):
            optimizer.zero_grad()
            z = self.network(batch[0])
            self.manual_backward(weight * self.loss(z, batch[1]))
            optimizer.step()
        return {"outputs": z}


class LastStepRecorder(StepRecorder):
    """Notes where the last step of each batch started."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self._open = None
        super().on_before_optimizer_step(trainer, pl_module, optimizer)


def test_of_two_steps_on_a_batch_the_last_is_measured() -> None:
    capture, recorder = Capture(), LastStepRecorder()
    monitor = DirectionalCurvatureMonitor(
        estimators=("hvp", "finite_difference"), every_n_train_steps=1, on_error="raise"
    )
    module = Twice(mlp(4, 6, 3), momentum)
    make_trainer(recorder, monitor, logger=capture).fit(module, loader(classification(3)))
    assert len(recorder.steps) == len(capture.rows) == 3
    for (_, row), step in zip(sorted(capture.rows.items()), recorder.steps, strict=True):
        truth = reference(module.network, lambda z, y: 0.5 * F.cross_entropy(z, y), step.parts, step.before, step.after)
        check_row(own(row), truth, step)
