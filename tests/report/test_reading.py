"""Both loggers give the same run, wherever its folder lies; what is no run gets one sentence."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_curvature import DirectionalCurvatureMonitor, HessianSpectrumMonitor
from lightning_curvature.report.reading import names_of, read_runs
from lightning_curvature.report.series import series_of
from tests.helpers.logged import write_csv
from tests.helpers.runs import Classifier, batched_samples, make_trainer, mlp


class Kept(Classifier):
    def __init__(self, learning_rate: float, layers: tuple[int, ...]) -> None:
        super().__init__(mlp(4, 6, 3), lambda m: torch.optim.SGD(m.parameters(), lr=learning_rate))
        self.save_hyperparameters()


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of one fit with both loggers."""
    folder = tmp_path_factory.mktemp("fit")
    loggers = [CSVLogger(folder / "csv", name="run"), TensorBoardLogger(folder / "board", name="run")]
    monitors = [
        HessianSpectrumMonitor(every_n_train_steps=2, by_module=True),
        DirectionalCurvatureMonitor(estimators=("hvp", "oscillation"), every_n_train_steps=1),
    ]
    make_trainer(*monitors, logger=loggers, max_epochs=3).fit(Kept(0.1, (4, 6)), batched_samples())
    return folder


def test_both_loggers_give_the_same_series(fitted: Path) -> None:
    (table,), (board,) = read_runs([fitted / "csv"]), read_runs([fitted / "board"])
    assert table.curves.keys() == board.curves.keys()
    for name, curve in table.curves.items():
        np.testing.assert_array_equal(curve.steps, board.curves[name].steps)
        # TensorBoard keeps 32 bits.
        np.testing.assert_array_equal(curve.values.astype(np.float32), board.curves[name].values.astype(np.float32))
    assert table.hparams == board.hparams == {"learning_rate": 0.1, "layers": [4, 6]}
    one, two = series_of(table, "curvature"), series_of(board, "curvature")
    for group in ("values", "diagnostics", "shares", "modules", "losses"):
        assert getattr(one, group).keys() == getattr(two, group).keys(), group
    assert one.values["lambda_max"].steps.tolist() == [0, 2, 4]
    assert one.values["lambda_dir"].steps.tolist() == list(range(6))
    assert list(one.losses) == ["train_loss"]
    assert set(one.modules["lambda_max_share"]) == {"network.0", "network.2"}


def test_nothing_is_thinned(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="long")
    for step in range(11_000):  # TensorBoard shows 1,000 of these, its reader keeps 10,000
        logger.experiment.add_scalar("curvature/lambda_dir", step, step)
    logger.experiment.add_text("note", "two\nlines", 3)
    logger.experiment.flush()
    (run,) = read_runs([tmp_path])
    assert run.curves["curvature/lambda_dir"].steps.tolist() == list(range(11_000))
    assert run.texts == {"note": [(3, "two\nlines")]}


def test_runs_are_found_below_and_named_by_what_differs(tmp_path: Path) -> None:
    for name in ("gd/version_0", "adam/deep/version_0"):
        write_csv(tmp_path / name, {"curvature/lambda_dir": [1.0]})
    runs = read_runs([tmp_path, tmp_path / "gd"])
    assert [run.name for run in runs] == ["adam/deep", "gd"]
    assert [run.name for run in read_runs([tmp_path / "gd"])] == ["gd/version_0"]


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["a/one"], ["one"]),
        (["a/one/version_3"], ["one/version_3"]),
        (["a/version_0", "a/version_1"], ["version_0", "version_1"]),
        (["a", "a/b"], [".", "b"]),
        (["x/a/y/version_0", "x/b/y/version_0"], ["a", "b"]),
    ],
)
def test_short_names(folders: list[str], names: list[str]) -> None:
    assert names_of([Path("/runs", folder) for folder in folders]) == names


def test_a_table_with_gaps_infinities_and_steps_twice(tmp_path: Path) -> None:
    text = "step,epoch,a,b\n0,0,1.5,\n1,0,nan,inf\n1,0,2.5,\n3,1,,-inf\n"
    (tmp_path / "metrics.csv").write_text(text)
    (run,) = read_runs([tmp_path])
    assert run.curves["a"].steps.tolist() == [0, 1]
    assert run.curves["a"].values.tolist() == [1.5, 2.5]
    assert run.curves["b"].values.tolist() == [math.inf, -math.inf]
    assert "epoch" not in run.curves


def test_hyperparameters_of_any_type(tmp_path: Path) -> None:
    text = "size: !!python/tuple [1, 2]\nkind: !!python/name:torch.nn.ReLU ''\nwhere: !!python/object:a.B {x: 1}\n"
    (run,) = read_runs([write_csv(tmp_path / "run", {"a": [1.0]}, hparams=text)])
    assert run.hparams == {"size": [1, 2], "kind": "torch.nn.ReLU", "where": {"x": 1}}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, r"DIR must be a folder, got '.*', where there is none: give a folder that CSVLogger \(metrics.csv\)"),
        ("", r"DIR must hold a logged run, got '.*' without one: give a folder"),
        ("a,b\n1,2\n", r"DIR must hold numbers by steps, as CSVLogger writes them, got '.*', whose line 2 is another"),
        ("step,b\n1,2\n2,x\n", r"DIR must hold numbers by steps, .*, whose line 3 is another: give"),
    ],
)
def test_what_is_no_run_gets_a_sentence(text: Any, sentence: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    if text is not None:
        folder.mkdir()
    if text:
        (folder / "metrics.csv").write_text(text)
    with pytest.raises(ValueError, match=sentence):
        read_runs([folder])


def test_hyperparameters_that_are_no_yaml_get_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"hparams.yaml must be YAML, got .*: remove it"):
        read_runs([write_csv(tmp_path / "run", {"a": [1.0]}, hparams="a: [1, 2")])
