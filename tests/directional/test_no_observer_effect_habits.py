"""A step may do more than compute a loss. Whatever it does to itself, the repetitions undo it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from lightning_curvature import DirectionalCurvatureMonitor
from lightning_curvature.directional.update_monitor import UpdateMonitor
from lightning_curvature.monitors.options import MonitorOptions
from tests.helpers.habits import HABITS, MOVING, Habit, Habitual
from tests.helpers.runs import classification, make_trainer
from tests.helpers.witness import ALL, Record, Rows, assert_same, copies, watch


def run(habit: Habit, monitor: DirectionalCurvatureMonitor | None, **options: Any) -> Record:
    return watch(lambda: Habitual(habit), lambda: copies(classification(4)), monitor, max_epochs=2, **options)


class Repeats(UpdateMonitor):
    """Repeats each step at θ_t, twice."""

    def __init__(self) -> None:
        super().__init__(MonitorOptions(on_error="raise"))
        self.losses: list[tuple[float, float, float]] = []

    def measure(self, trainer: Any, window: Any, failure: Any) -> None:
        with window.at(0.0):
            first, second = (next(iter(window.evaluations())).loss for _ in range(2))
        self.losses.append((float(window.records[0].base.loss), float(first), float(second)))


@pytest.mark.parametrize("name", [name for name in HABITS if name not in MOVING])
@pytest.mark.thinned(4)
def test_repeated_step_has_the_loss_it_had(name: str) -> None:
    pl.seed_everything(3, verbose=False)
    repeats = Repeats()
    trainer = make_trainer(repeats, logger=Rows())
    trainer.fit(Habitual(HABITS[name]), copies(classification(4)))
    assert len(repeats.losses) == 4
    for base, first, second in repeats.losses:
        assert base == first == second


class Graph:
    """A batch as an object of its own class."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y, self.name = x, y, "graph"


class Augmenting(Habitual):
    """Changes its batch before it uses it."""

    def __init__(self, change: Callable[[Any], tuple[Tensor, Tensor]]) -> None:
        super().__init__(lambda module, x, logits: None)
        self.change = change

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(self.change(batch), batch_idx)


def scales_tensor(batch: Any) -> tuple[Tensor, Tensor]:
    batch[0].mul_(1.5).add_(torch.rand_like(batch[0]))
    return batch


def scales_past_autograd(batch: Any) -> tuple[Tensor, Tensor]:
    batch[0].data.mul_(1.5)
    return batch


def replaces_entry(batch: Any) -> tuple[Tensor, Tensor]:
    batch[0] = batch[0] * 1.5
    return batch[0], batch[1]


def replaces_attribute(batch: Any) -> tuple[Tensor, Tensor]:
    batch.x, batch.name = batch.x * 1.5, batch.name + "!"
    return batch.x, batch.y


@pytest.mark.parametrize("change", [scales_tensor, scales_past_autograd, replaces_entry, replaces_attribute])
def test_step_that_changes_its_batch(change: Callable[[Any], tuple[Tensor, Tensor]]) -> None:
    kind: Any = {replaces_entry: list, replaces_attribute: lambda pair: Graph(*pair)}.get(change, tuple)
    batches = [kind(pair) for pair in classification(4)]
    monitor = DirectionalCurvatureMonitor(estimators=ALL, every_n_train_steps=1, epsilon=1e-3, on_error="raise")
    plain, watched = (watch(lambda: Augmenting(change), lambda: copies(batches), m) for m in (None, monitor))
    assert_same(plain, watched)
    # Each evaluation began with the batch as it came: forward mode, double backward and differences agree on one
    # function (to ε², the truncation; a batch scaled twice would be off by half).
    row = watched.logger.rows[0]
    assert row["curvature/lambda_fd"] == pytest.approx(row["curvature/lambda_dir"], rel=1e-4)
    assert row["curvature/lambda_kl"] == pytest.approx(row["curvature/lambda_gn"], rel=1e-4)


def test_two_monitors_leave_nothing_behind() -> None:
    monitors = [
        DirectionalCurvatureMonitor(estimators=("kl",), every_n_train_steps=n, prefix=f"curvature_{n}") for n in (1, 2)
    ]
    plain = run(HABITS["averages_in_place"], None)
    watched = watch(
        lambda: Habitual(HABITS["averages_in_place"]),
        lambda: copies(classification(4)),
        monitors[0],
        lambda: [monitors[1]],
        max_epochs=2,
    )
    assert_same(plain, watched)
    assert len(watched.logger.curve("curvature_2/lambda_kl")) == 4
    assert len(watched.logger.curve("curvature_1/lambda_kl")) == 8
    assert "training_step" not in vars(watched.module)
