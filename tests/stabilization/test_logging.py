"""What StabilizationMonitor writes, to whom: loggers, metrics, TensorBoard's curves against k, table and picture."""

from __future__ import annotations

import csv
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_curvature import CurvatureWarning, StabilizationMonitor
from lightning_curvature.reporting.names import full_name
from lightning_curvature.stabilization.options import QUANTITIES
from lightning_curvature.stabilization.result import CriterionRow, SampleGrowth
from tests.helpers.runs import Capture, Classifier, make_trainer, mlp, rows, warned
from tests.helpers.setups import sgd
from tests.helpers.stabilization import samples
from tests.helpers.tensorboard import read
from tests.testers.families.stabilization import keys


def monitor(**options: Any) -> StabilizationMonitor:
    """Two of everything that makes a curve, at two k."""
    quick: dict[str, Any] = {
        "sample_sizes": (2, 5),
        "subspace_dim": (1, 2),
        "candidates": 2,
        "sigma": (1e-3, 1e-2),
        "trace_vectors": 3,
        "tolerance": 0.1,
        "on_error": "raise",
    }
    return StabilizationMonitor(**(quick | options))


def fit(*callbacks: Any, logger: Any = None, **options: Any) -> Any:
    """Two steps an epoch."""
    torch.manual_seed(3)  # of shuffling
    trainer = make_trainer(*callbacks, logger=logger, **options)
    trainer.fit(Classifier(mlp(4, 6, 3), sgd), samples())
    return trainer


def row_of(growth: SampleGrowth, criterion: str) -> CriterionRow:
    """The row that stands in the logs: the largest k and D, the first σ and estimator."""
    last = [row for row in growth.rows if row.criterion == criterion and row.k == 5]
    largest = max(row.dimension for row in last)
    return next(row for row in last if row.dimension == largest)


def test_values_are_those_of_the_table() -> None:
    capture, follow = Capture(), monitor(estimators=("direct", "gaussian_moment"), draws=4)
    fit(follow, logger=capture)
    (found,) = rows(capture).values()
    assert follow.result is not None
    assert found["validated_sigma"] == follow.result.validated_sigma
    for key in QUANTITIES:
        row = row_of(follow.result, key)
        assert row.sigma == (0.0 if key == "delta_1" else 1e-3)
        assert row.estimator == ("exact" if key == "delta_1" else "direct")
        assert row.dimension == {"delta_1": 0, "delta_2": 51, "delta_2_subspace": 2}[key]
        assert found[key] == row.value
        assert found[f"{key}_stderr"] == math.hypot(row.stderr_samples, row.stderr_draws)


def test_at_several_steps(tmp_path: Path) -> None:
    """In the rows of the steps that come after, and at the end in one of its own."""
    capture, follow = Capture(), monitor(every_n_train_steps=3, at_steps=(1, 99), quantities=("delta_1",))
    grown = []

    class Results(ModelCheckpoint):
        def on_train_batch_start(self, *args: Any) -> None:
            grown.append(follow.result)

    fit(follow, Results(tmp_path), logger=capture, max_epochs=2, enable_checkpointing=True)
    found = rows(capture)
    assert list(found) == [0, 1, 3, 4]
    assert len({row["delta_1"] for row in found.values()}) == 4
    assert len({id(growth) for growth in grown}) == 3  # step 2 has that of step 1
    # The prefix is the default one; a monitor of every step has the same values.
    again = Capture()
    fit(monitor(every_n_train_steps=1, quantities=("delta_1",)), logger=again, max_epochs=2)
    assert {step: row for step, row in rows(again).items() if step != 2} == found


@pytest.mark.slow
def test_tensorboard(tmp_path: Path) -> None:
    logger, follow = TensorBoardLogger(tmp_path, name="run"), monitor(at_steps=(1,))
    found: list[SampleGrowth] = []

    class Results(ModelCheckpoint):
        def on_train_batch_end(self, *args: Any) -> None:
            found.extend([follow.result] if follow.result is not None and follow.result not in found else [])

    fit(follow, Results(), logger=logger, enable_checkpointing=True)
    assert follow.result is not None
    found.append(follow.result)
    logger.experiment.flush()
    events = read(logger.log_dir)
    against_k: dict[str, list[tuple[int, float]]] = {}
    for step, growth in zip((1, 2), found, strict=True):
        for row in growth.rows:
            parts = [f"D={row.dimension}"] * bool(row.dimension) + [f"sigma={row.sigma:g}"] * bool(row.sigma)
            name = "_".join([row.criterion, *parts, row.estimator])
            against_k.setdefault(f"curvature_by_samples/step={step}/{name}", []).append((row.k, row.value))
    assert len(against_k) == 2 * (1 + 2 + 4)
    written = {tag for tag in events.Tags()["scalars"] if tag.startswith("curvature_by_samples")}
    assert written == set(against_k)
    for tag, points in against_k.items():
        # Event files hold float32.
        assert [(e.step, e.value) for e in events.Scalars(tag)] == [(k, pytest.approx(v, rel=1e-6)) for k, v in points]
        assert [k for k, _ in points] == [2, 5]
    pictures = events.Images("curvature/sample_growth")
    assert [picture.step for picture in pictures] == [1, 2]
    assert len({picture.encoded_image_string for picture in pictures}) == 2
    assert all(picture.encoded_image_string.startswith(b"\x89PNG") for picture in pictures)
    assert [event.step for event in events.Scalars("curvature/delta_2")] == [1, 2]


def table(path: Path) -> list[dict[str, Any]]:
    """Rows of the file, in the types of the table."""
    kinds = {name: type(value) for name, value in asdict(CriterionRow(1, "", "", 0, 0.0, 0.0, 0.0, 0.0)).items()}
    with path.open(newline="", encoding="utf-8") as file:
        return [
            {name: (cell == "True" if kinds[name] is bool else kinds[name](cell)) for name, cell in row.items()}
            for row in csv.DictReader(file)
        ]


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
@pytest.mark.thinned(2)
def test_files(kind: Any, tmp_path: Path) -> None:
    """In the folder of the first logger that has one."""
    logger, follow = kind(tmp_path / "first"), monitor(at_steps=(0,), prefix="c/d", candidates=1)
    fit(follow, logger=[Capture(), logger, CSVLogger(tmp_path / "second")])
    assert follow.result is not None
    folder = Path(logger.log_dir)
    names = {f"c-d-stabilization-step={step}" for step in (0, 2)}
    assert {path.stem for path in folder.glob("*stabilization*")} == names
    assert not list((tmp_path / "second").rglob("*stabilization*"))
    # As text, in which a NaN (an error over one sample) equals a NaN.
    assert repr(table(folder / "c-d-stabilization-step=2.csv")) == repr([asdict(row) for row in follow.result.rows])
    assert table(folder / "c-d-stabilization-step=0.csv")[0]["value"] != follow.result.rows[0].value
    assert (folder / "c-d-stabilization-step=2.png").read_bytes().startswith(b"\x89PNG")


def test_files_behind_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.chdir(tmp_path)
    logger = TensorBoardLogger("memory://bucket/runs")
    fit(monitor(), logger=logger)
    found = {Path(path).suffix for path in fsspec.filesystem("memory").glob("/bucket/runs/**/*stabilization-step=2.*")}
    assert found == {".csv", ".png"}
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    """One sentence; the run has its values, and goes on even where errors are raised: other ranks would wait for it."""

    class Elsewhere(Capture):
        log_dir = str(tmp_path / "file" / "folder")

    (tmp_path / "file").write_text("in the way")
    capture, follow = Elsewhere(), monitor()
    said = warned(lambda: fit(follow, logger=capture))
    assert len(said) == 1
    assert said[0].startswith(f"the logger's folder must be one that can be written to, got '{Elsewhere.log_dir}' (")
    assert said[0].endswith("): the table is in the monitor's result alone.")
    assert set(rows(capture)[2]) == keys(*QUANTITIES)
    assert follow.result is not None


def test_without_loggers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    follow = monitor()
    trainer = fit(follow, logger=False)
    assert follow.result is not None
    for key, value in follow.result.headline().items():
        assert trainer.callback_metrics[full_name("curvature", key)].item() == pytest.approx(value, rel=1e-6)
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"] + ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    logger, follow = TensorBoardLogger(tmp_path, name="run"), monitor()
    said = warned(lambda: fit(follow, logger=logger))
    assert said == ["the stabilization table comes without a picture: install matplotlib to have one."]
    assert follow.result is not None
    assert follow.result.draw() is None
    logger.experiment.flush()
    events = read(logger.log_dir)
    assert events.Tags()["images"] == []
    assert len([tag for tag in events.Tags()["scalars"] if tag.startswith("curvature_by_samples")]) == 7
    assert {path.suffix for path in Path(logger.log_dir).glob("*stabilization*")} == {".csv"}
    # Nor is it missed where nobody would see it.
    assert warned(lambda: fit(monitor(), logger=False)) == []


def test_two_monitors(tmp_path: Path) -> None:
    """Of distinct prefixes: each writes by its own names, also where options differ what it writes alone."""
    one = lambda: monitor(quantities=("delta_1", "delta_2_subspace"))  # noqa: E731
    two = lambda: monitor(prefix="held_out", seed=1, sample_sizes=(3,), quantities=("delta_1",))  # noqa: E731
    alone = {}
    for make in (one, two):
        capture, follow = Capture(), make()
        fit(follow, logger=capture)
        alone[follow.prefix] = rows(capture, follow.prefix)
    logger, capture = TensorBoardLogger(tmp_path, name="run"), Capture()
    fit(one(), two(), logger=[capture, logger])
    assert {prefix: rows(capture, prefix) for prefix in alone} == alone
    names = {path.name for path in Path(logger.log_dir).glob("*.csv")}
    assert names == {f"{prefix}-stabilization-step=2.csv" for prefix in alone}
    logger.experiment.flush()
    assert set(read(logger.log_dir).Tags()["images"]) == {f"{prefix}/sample_growth" for prefix in alone}


def test_a_text_of_the_table_names_every_curve() -> None:
    follow = monitor(sigma=(1e-3, 30.0), subspace_dim=2, max_products=3, tolerance=1e-12)
    with pytest.warns(CurvatureWarning):
        fit(follow)
    assert follow.result is not None
    text = str(follow.result)
    lines = text.splitlines()
    assert len(lines) == 1 + len(follow.result.curves()) + 4
    assert "k=2" in lines[0]
    assert "k=5" in lines[0]
    assert "eigenvectors did not converge to the tolerance at k = 2, 5" in lines
    for where in ("subspace", "full space"):
        assert f"quadratic model in the {where} within 10% up to σ = 0.001" in lines
    assert lines[-1].startswith("seconds: ")
