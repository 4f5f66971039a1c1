"""Where numbers go: every logger at Lightning's own step, the Trainer's metrics, the progress bar, TensorBoard."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_curvature.reporting.layout import begin
from lightning_curvature.reporting.loggers import CurvatureWarning, report, warn
from tests.helpers.runs import Capture, Classifier, classification, loader, make_trainer, mlp
from tests.helpers.tensorboard import charts, layouts


class Reporter(pl.Callback):
    """Reports ``values(step)`` after every optimizer step."""

    def __init__(self, values: Callable[[int], dict[str, float]], progress_bar: tuple[str, ...] = ()) -> None:
        self.values, self.progress_bar = values, progress_bar
        self.watchable: list[dict[str, float]] = []
        self._steps = 0

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self._steps:
            return  # a batch of an accumulation window that goes on
        self._steps = trainer.global_step
        report(trainer, self.values(trainer.global_step - 1), self.progress_bar)
        self.watchable.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("curvature")})


class Charts(pl.Callback):
    def __init__(self, name: str) -> None:
        self.name = name

    def charts(self, trainer: pl.Trainer) -> dict[str, list[str]]:
        return {f"{self.name}: λ": [f"{self.name}/lambda_kl", f"{self.name}/two_over_lr"]}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        begin(trainer)


def sgd(module: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.1)


def fit(*callbacks: pl.Callback, batches: int = 4, **options: Any) -> pl.Trainer:
    trainer = make_trainer(*callbacks, **options)
    trainer.fit(Classifier(mlp(4, 6, 3), sgd), loader(classification(batches)))
    return trainer


@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_logger_gets_the_values_at_lightnings_step(accumulate: int, tmp_path: Path) -> None:
    first, second = Capture(), Capture()
    files = CSVLogger(tmp_path, name="run")
    board = TensorBoardLogger(tmp_path, name="board")
    reporter = Reporter(lambda step: {"curvature/a": 10.0 + step, "curvature/b": math.nan})
    fit(reporter, logger=[first, second, files, board], batches=4 * accumulate, accumulate_grad_batches=accumulate)
    steps = [step for step, row in first.rows.items() if "train_loss" in row]
    assert steps == [0, 1, 2, 3]
    for capture in (first, second):
        assert [capture.rows[step]["curvature/a"] for step in steps] == [10.0, 11.0, 12.0, 13.0]
        assert math.isnan(capture.rows[3]["curvature/b"])
    text = Path(files.log_dir, "metrics.csv").read_text().splitlines()
    column = text[0].split(",").index("curvature/a")
    assert [cell for line in text[1:] if (cell := line.split(",")[column])] == ["10.0", "11.0", "12.0", "13.0"]
    events = EventAccumulator(board.log_dir).Reload()
    assert [(e.step, e.value) for e in events.Scalars("curvature/a")] == [(s, 10.0 + s) for s in steps]


def test_without_a_logger_the_values_can_still_be_watched() -> None:
    trainer = fit(Reporter(lambda step: {"curvature/a": float(step)}), logger=False)
    assert trainer.loggers == []
    assert trainer.callback_metrics["curvature/a"].item() == 3.0


def test_watched_values_stay_finite_once_they_were() -> None:
    """EarlyStopping takes a NaN for the end of training; one step that went uphill is not."""
    values = [math.nan, 2.0, math.nan, math.inf, 5.0]
    reporter = Reporter(lambda step: {"curvature/a": values[step]})
    capture = Capture()
    fit(reporter, logger=capture, batches=5)
    seen = [row["curvature/a"] for row in reporter.watchable]
    assert math.isnan(seen[0])
    assert seen[1:] == [2.0, 2.0, 2.0, 5.0]
    # The loggers get what was measured.
    assert [str(v) for v in capture.curve("curvature/a")] == [str(v) for v in values]


def test_the_users_own_values_stay_beside_them() -> None:
    capture = Capture()
    trainer = fit(Reporter(lambda step: {"curvature/a": 1.0}), logger=capture)
    assert len(capture.curve("train_loss")) == 4
    assert trainer.callback_metrics["train_loss"].item() == pytest.approx(capture.curve("train_loss")[-1], rel=1e-6)


def test_progress_bar_shows_what_was_asked_for() -> None:
    values = {"curvature/a": 1.5, "curvature/b": 2.5}
    trainer = fit(Reporter(lambda step: values, progress_bar=("curvature/b", "curvature/absent")))
    assert {k: v for k, v in trainer.progress_bar_metrics.items() if "curvature" in k} == {"curvature/b": 2.5}
    trainer = fit(Reporter(lambda step: values))
    assert not any("curvature" in key for key in trainer.progress_bar_metrics)


def test_one_layout_for_all_monitors_however_often_the_run_is_taken_up(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="run")
    for _ in range(2):
        fit(Charts("one"), Charts("two"), logger=logger, batches=2)
    logger.experiment.flush()
    (layout,) = layouts(logger.log_dir)
    assert layout.category[0].title == "Curvature"
    assert len(layout.category) == 1
    assert charts(layout) == {f"{n}: λ": [f"{n}/lambda_kl", f"{n}/two_over_lr"] for n in ("one", "two")}


def test_every_tensorboard_logger_gets_its_layout(tmp_path: Path) -> None:
    loggers = [TensorBoardLogger(tmp_path, name=name) for name in ("first", "second")]
    fit(Charts("one"), logger=[*loggers, Capture()])
    for logger in loggers:
        logger.experiment.flush()
        assert len(layouts(logger.log_dir)) == 1


def test_a_fast_dev_run_writes_nothing() -> None:
    trainer = fit(Charts("one"), Reporter(lambda step: {"curvature/a": 1.0}), fast_dev_run=1, logger=Capture())
    assert trainer.callback_metrics["curvature/a"].item() == 1.0


def test_the_same_warning_comes_once() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        for _ in range(3):
            for message in ("one thing", "another"):
                warn(message)
    assert [str(w.message) for w in caught] == ["one thing", "another"]
    assert {w.category for w in caught} == {CurvatureWarning}
