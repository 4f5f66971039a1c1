"""What a monitor writes, to whom, and that training can act on it; the same after a checkpoint and from YAML."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.utils.data import DataLoader

from lightning_curvature.reporting.names import full_name
from tests.helpers.runs import YAML_TRAINER, Capture, Classifier, batched_samples, make_trainer, mlp, rows, warned
from tests.helpers.tensorboard import charts, layouts, read
from tests.testers.family import FamilyTester, Options, numbered


class Learner(Classifier):
    """A module the command line can make; two steps an epoch."""

    def __init__(self, lr: float = 0.3) -> None:
        super().__init__(mlp(4, 6, 3), lambda m: torch.optim.SGD(m.parameters(), lr=lr, momentum=0.5))

    def train_dataloader(self) -> DataLoader[Any]:
        return batched_samples()


def fit(*callbacks: Any, logger: Any = None, **options: Any) -> Any:
    """Four steps, of which a monitor of ``few`` measures those of index 0 and 2."""
    trainer = make_trainer(*callbacks, logger=logger, **({"max_epochs": 2} | options))
    trainer.fit(Learner())
    return trainer


class ReportTester(FamilyTester):
    """Loggers, metrics, progress bar, stoppers, TensorBoard, command line."""

    def cases(self) -> dict[str, Mapping[str, Any]]:
        """Return selections of quantities, charts and configurations."""
        family = self.family
        return {
            "selection": numbered(family.selections),
            "chart": numbered(family.charts),
            "command": {str(i): command for i, command in enumerate(family.commands)},
        }

    @pytest.mark.thinned(5)
    def test_keys(self, selection: tuple[Options, set[str]]) -> None:
        options, expected = selection
        capture = Capture()
        follow = self.family.make_few(prefix="c/d", **options)
        trainer = fit(follow, logger=capture)
        found = rows(capture, "c/d")
        assert list(found) == ([0, 2] if expected else [])
        written = {key for row in capture.rows.values() for key in row}
        charted = {key for keys in follow.charts(trainer).values() for key in keys}
        assert {key for key in charted if not key.startswith("c_over_edge/d/")} <= written
        for row in found.values():
            assert set(row) == expected
            assert {key for key, value in row.items() if math.isnan(value)} == self.family.undefined & expected
            for key, value in row.items() if row is list(found.values())[-1] else ():
                # callback_metrics hold float32.
                assert trainer.callback_metrics[full_name("c/d", key)].item() == pytest.approx(
                    value, rel=1e-6, nan_ok=True
                )

    def test_every_logger_gets_the_same(self, tmp_path: Path) -> None:
        capture, table = Capture(), CSVLogger(tmp_path)
        fit(self.family.make_few(), logger=[capture, table])
        with (Path(table.log_dir) / "metrics.csv").open() as file:
            written = {
                int(r["step"]): r for r in csv.DictReader(file) if r[full_name("curvature", self.family.watched)]
            }
        assert list(written) == list(rows(capture)) == [0, 2]
        for step, row in rows(capture).items():
            for key, value in row.items():
                assert float(written[step][full_name("curvature", key)]) == pytest.approx(
                    value, rel=0.0, abs=0.0, nan_ok=True
                )

    def test_a_logger_within_the_modules_reach_keeps_the_values(self) -> None:
        """A measurement puts back what the module holds: before it writes."""
        capture, module = Capture(), Learner()
        module.notes = [capture]  # type: ignore[assignment]
        make_trainer(self.family.make_few(), logger=capture, max_epochs=2).fit(module)
        found = rows(capture)
        assert list(found) == [0, 2]
        assert all(full_name("curvature", self.family.watched) in capture.rows[step] for step in found)

    def test_without_any_logger(self) -> None:
        trainer = fit(self.family.make_few(), logger=False)
        assert trainer.callback_metrics[full_name("curvature", self.family.watched)].item() > 0.0

    @pytest.mark.parametrize("shown", [True, False])
    def test_progress_bar_metrics(self, shown: bool) -> None:
        if not self.family.shown:
            pytest.skip("shows nothing on the progress bar")
        capture = Capture()
        trainer = fit(self.family.make_few(progress_bar=shown), logger=capture)
        found = {k: v for k, v in trainer.progress_bar_metrics.items() if k.startswith("curvature")}
        last = {f"curvature/{key}": rows(capture)[2][key] for key in self.family.shown}
        assert found == (last if shown else {})

    @pytest.mark.parametrize("stops", [True, False])
    def test_early_stopping_acts_on_it(self, stops: bool) -> None:
        """Below or above what is measured at the first step; looked at after an epoch of two."""
        capture = Capture()
        fit(self.family.make_few(), logger=capture)
        bound = rows(capture)[0][self.family.watched] * (0.5 if stops else 1e6)
        stop = EarlyStopping(
            full_name("curvature", self.family.watched),
            mode="min",
            divergence_threshold=bound,
            patience=99,
            check_on_train_epoch_end=True,
        )
        assert fit(self.family.make_few(), stop).global_step == (2 if stops else 4)

    def test_model_checkpoint_keeps_the_smallest(self, tmp_path: Path) -> None:
        name = full_name("curvature", self.family.watched)
        keep = ModelCheckpoint(tmp_path, monitor=name, mode="min", every_n_train_steps=1)
        capture = Capture()
        follow = self.family.make_few(every_n_train_steps=1)
        fit(follow, keep, logger=capture, enable_checkpointing=True)
        values = [row[self.family.watched] for row in rows(capture).values()]
        assert len(set(values)) == 4
        assert keep.best_model_score is not None
        assert keep.best_model_score.item() == pytest.approx(min(values), rel=1e-6)  # float32

    def test_tensorboard_shows_the_values(self, tmp_path: Path) -> None:
        logger, capture = TensorBoardLogger(tmp_path, name="run"), Capture()
        fit(self.family.make_few(), logger=[logger, capture])
        logger.experiment.flush()
        events = read(logger.log_dir)
        for key in rows(capture)[0]:
            written = {event.step: event.value for event in events.Scalars(full_name("curvature", key))}
            # Event files hold float32.
            expected = {s: pytest.approx(row[key], rel=1e-6, nan_ok=True) for s, row in rows(capture).items()}
            assert written == expected, key

    def test_charts(self, chart: tuple[Options, dict[str, list[str]], list[str]], tmp_path: Path) -> None:
        """Once, however many monitors and fits there are; the shares of the edge before all else."""
        options, expected, shares = chart
        logger = TensorBoardLogger(tmp_path, name="run")
        for _ in range(2):
            fit(self.family.make_few(prefix="a", **options), self.family.make_few(prefix="b", **options), logger=logger)
        logger.experiment.flush()
        for prefix in "ab" if shares else "":
            written = {tag for tag in read(logger.log_dir).Tags()["scalars"] if tag.startswith(f"{prefix}_over_edge/")}
            assert written == {f"{prefix}_over_edge/{key}" for key in (*shares, "edge")}
        (layout,) = layouts(logger.log_dir)
        assert [category.title for category in layout.category] == ["Curvature"]
        of_edge = {f"{p}: share of the edge": [f"{p}_over_edge/"] for p in "ab" if shares}
        others = {f"{p}: {title}": [f"{p}/{key}" for key in keys] for p in "ab" for title, keys in expected.items()}
        assert list(charts(layout).items()) == [*of_edge.items(), *others.items()]

    def test_monitors_of_distinct_prefixes(self) -> None:
        """Each writes what it writes alone."""
        one, two = self.family.make_few(), self.family.make_few(prefix="other", every_n_train_steps=1)
        assert one.state_key != two.state_key
        both, alone = Capture(), Capture()
        fit(one, two, logger=both)
        fit(self.family.make_few(), logger=alone)
        assert repr(rows(both)) == repr(rows(alone))
        assert list(rows(both, "other")) == [0, 1, 2, 3]
        assert repr(rows(both, "other")[0]) == repr(rows(both)[0])

    def test_pictures(self, tmp_path: Path) -> None:
        """One of each at each measured step; the user's own figures are left alone."""
        import matplotlib.pyplot as plt

        options, names, _ = self._drawing()
        figure, backend, before = plt.figure(), plt.get_backend(), plt.get_fignums()
        logger = TensorBoardLogger(tmp_path, name="run")
        fit(self.family.make_few(**options), logger=logger)
        logger.experiment.flush()
        events = read(logger.log_dir)
        assert sorted(events.Tags()["images"]) == sorted(f"curvature/{name}" for name in names)
        for name in names:
            images = events.Images(f"curvature/{name}")
            assert [image.step for image in images] == [0, 2]
            assert len({image.encoded_image_string for image in images}) == 2
            assert all(image.encoded_image_string.startswith(b"\x89PNG") for image in images)
        assert plt.gcf() is figure
        assert (plt.get_fignums(), plt.get_backend()) == (before, backend)
        plt.close(figure)

    def test_without_matplotlib(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        options, _, sentence = self._drawing()
        for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"] + ["matplotlib"]:
            monkeypatch.setitem(sys.modules, name, None)
        logger = TensorBoardLogger(tmp_path, name="run")
        assert warned(lambda: fit(self.family.make_few(**options), logger=logger)) == [sentence]
        logger.experiment.flush()
        assert read(logger.log_dir).Tags()["images"] == []

    def _drawing(self) -> tuple[Options, tuple[str, ...], str]:
        if self.family.pictures is None:
            pytest.skip("draws no pictures")
        return self.family.pictures

    @pytest.mark.thinned(5)
    def test_command_line(self, command: tuple[Options, set[str]], tmp_path: Path) -> None:
        """YAML takes JSON."""
        options, expected = command
        config = tmp_path / "config.yaml"
        entry = {"class_path": f"lightning_curvature.{self.family.name}", "init_args": options | {"prefix": "sharp"}}
        config.write_text(f"{YAML_TRAINER}    - {json.dumps(entry)}\n")
        with contextlib.chdir(tmp_path) if hasattr(contextlib, "chdir") else contextlib.nullcontext():
            cli = LightningCLI(Learner, args=["fit", "--config", str(config)], save_config_callback=None)
        (follow,) = [c for c in cli.trainer.callbacks if isinstance(c, self.family.monitor)]
        for name, value in options.items():
            found = getattr(follow, name)
            assert (list(found) if isinstance(found, tuple) else found) == value, name
        metrics = cli.trainer.callback_metrics
        names = {full_name("sharp", key): key for key in expected}
        found = {names.get(name, name) for name in metrics if name.startswith("sharp") and "_over_edge/" not in name}
        assert found == expected
        assert self.family.watched not in found or metrics[full_name("sharp", self.family.watched)] > 0.0
        finite = {key for key in found if math.isfinite(metrics[full_name("sharp", key)])}
        assert found - finite == self.family.undefined & expected
