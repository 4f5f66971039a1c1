"""What a run leaves behind with a monitor: checkpoints, stoppers and logs, whether they know of it or not."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.compatibility.features import Feature, Learner, data, plain
from tests.compatibility.monitors import MONITORS, Kind, each_monitor
from tests.helpers.runs import Capture, make_trainer
from tests.helpers.witness import Record, assert_same, frozen, without_curvature

DEVELOPMENT = Feature(options={"fast_dev_run": 2})
development = functools.cache(lambda: DEVELOPMENT.run(None))


@each_monitor
def test_fast_dev_run(kind: Kind) -> None:
    """Lightning takes all loggers away: the values are where callbacks and tests look for them."""
    watched = DEVELOPMENT.run(kind.make())
    assert_same(development(), watched)
    assert watched.trainer.global_step == 2
    assert watched.logger.rows == {}
    assert all(math.isfinite(watched.trainer.callback_metrics[f"curvature/{key}"]) for key in kind.keys)


def stopped(monitor: pl.Callback | None, watched: str) -> tuple[Record, EarlyStopping]:
    # Nothing is better than the first value by that much.
    stopper = EarlyStopping(watched, patience=1, min_delta=1e9)
    return Feature(options={"max_epochs": 5}, callbacks=lambda: [stopper]).run(monitor), stopper


stopped_by_loss = functools.cache(lambda: stopped(None, "val_loss")[0])


@each_monitor
@pytest.mark.thinned(4)
def test_early_stopping_on_a_value(kind: Kind) -> None:
    """It stops where a stopper that watches the loss, with as little hope, would."""
    watched, stopper = stopped(kind.make(), f"curvature/{kind.watched}")
    assert_same(stopped_by_loss(), watched)
    assert stopper.stopped_epoch == 1
    # The last value of the first epoch, of six steps; in float32, as all of callback_metrics.
    assert stopper.best_score == torch.tensor(watched.logger.rows[3][f"curvature/{kind.watched}"], dtype=torch.float32)


@each_monitor
@pytest.mark.thinned(5)
def test_checkpoints(kind: Kind, tmp_path: Path) -> None:
    """Every file holds what it held, and the state of the monitor beside it."""

    def saved(monitor: pl.Callback | None, name: str) -> tuple[Record, dict[str, Any]]:
        # Under one path, which is in the files, too.
        folder = tmp_path / "checkpoints"
        saver = ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1, save_last=True)
        feature = Feature(options={"enable_checkpointing": True}, callbacks=lambda: [saver])
        record = feature.run(monitor)
        moved = folder.rename(tmp_path / name)
        # Nothing in them needs to be trusted.
        return record, {file.name: torch.load(file, weights_only=True) for file in sorted(moved.iterdir())}

    monitor = kind.make()
    record, files = saved(None, "plain")
    watched, files_too = saved(monitor, "watched")
    assert_same(record, watched)
    assert list(files) == list(files_too)
    assert len(files) == 7
    states = [content["callbacks"].pop(monitor.state_key, None) for content in files_too.values()]
    assert frozen(files) == frozen(files_too)
    stateless = [MONITORS[name] for name in ("sharpness", "stabilization", "noise")]
    assert all(state == {} or state is None for state in states) == (kind in stateless)


@each_monitor
@pytest.mark.thinned(4)
def test_checkpoint_of_the_best_value(kind: Kind, tmp_path: Path) -> None:
    name = f"curvature/{kind.watched}"
    saver = ModelCheckpoint(tmp_path, monitor=name, mode="max", every_n_train_steps=3)
    feature = Feature(options={"enable_checkpointing": True}, callbacks=lambda: [saver])
    watched = feature.run(kind.make())
    assert_same(plain("plain"), watched)
    best = max(row[name] for row in watched.logger.rows.values() if name in row)
    assert saver.best_model_score == torch.tensor(best, dtype=torch.float32)


def written(folder: Path) -> tuple[dict[str, list[Any]], list[str]]:
    """Scalars that TensorBoard reads, by key, and the lines of the table."""
    events = EventAccumulator(str(next(folder.glob("tensorboard/version_0")))).Reload()
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return scalars, (folder / "table" / "version_0" / "metrics.csv").read_text().splitlines()


def cells(lines: list[str]) -> list[dict[str, str]]:
    """Rows of a table of numbers, without empty cells."""
    names = lines[0].split(",")
    return [{name: cell for name, cell in zip(names, line.split(","), strict=True) if cell != ""} for line in lines[1:]]


@each_monitor
@pytest.mark.thinned(5)
def test_several_loggers(kind: Kind, tmp_path: Path) -> None:
    """Each gets the user's values as it did, and the monitor's."""

    def logged(monitor: pl.Callback | None, folder: Path) -> tuple[Any, Any, Capture]:
        pl.seed_everything(3, verbose=False)
        capture = Capture()
        loggers = [
            TensorBoardLogger(folder, name="tensorboard"),
            CSVLogger(folder, name="table", flush_logs_every_n_steps=1),
            capture,
        ]
        module = Learner()
        trainer = make_trainer(*([monitor] if monitor else []), logger=loggers, max_epochs=2)
        trainer.fit(module, *data())
        return *written(folder), capture

    scalars, lines, capture = logged(None, tmp_path / "plain")
    scalars_too, lines_too, capture_too = logged(kind.make(), tmp_path / "watched")
    assert without_curvature(scalars_too) == scalars
    rows, rows_too = cells(lines), cells(lines_too)
    assert [row for row in map(without_curvature, rows_too) if row.keys() - {"step"}] == rows
    assert {step: own for step, row in capture_too.rows.items() if (own := without_curvature(row))} == capture.rows
    kind.check(capture_too.rows, (0, 3, 6, 9))
    for key in (f"curvature/{key}" for key in kind.keys):
        values = {step: row[key] for step, row in capture_too.rows.items() if key in row}
        # TensorBoard keeps float32.
        assert scalars_too[key] == [(step, pytest.approx(value, rel=1e-7)) for step, value in values.items()]
        assert {int(row["step"]): float(row[key]) for row in rows_too if key in row} == values
