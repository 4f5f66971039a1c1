"""Checkpoints of a run of LightningCLI, measured from its configuration."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader

from lightning_curvature import HessianSpectrumMonitor, evaluate_checkpoints
from lightning_curvature.command.measure import measure
from tests.helpers.runs import Classifier, batched_samples, mlp

STEPS = (2, 4)


class Learner(Classifier):
    """A module that the command line can make."""

    def __init__(self, width: int = 6) -> None:
        super().__init__(mlp(4, width, 3, dtype=torch.float32), lambda m: torch.optim.SGD(m.parameters(), lr=0.3))


class Bare(Learner):
    """Its optimizer is made from the configuration."""

    configure_optimizers = pl.LightningModule.configure_optimizers


class Samples(pl.LightningDataModule):
    """Its loader exists when it is set up."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.size = size

    def setup(self, stage: str) -> None:
        self.loader = DataLoader(batched_samples(32, dtype=torch.float32).dataset, batch_size=self.size)

    def train_dataloader(self) -> Any:
        return self.loader


def run(folder: Path, classes: tuple[Any, Any] = (None, None), **given: Any) -> Path:
    """Train by a command line, and return the configuration that it has saved."""
    checkpoint = {"class_path": "ModelCheckpoint", "init_args": {"dirpath": str(folder)}}
    checkpoint["init_args"] |= {"save_top_k": -1, "every_n_train_steps": 2}  # type: ignore[operator]
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": str(folder)}}
    trainer: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False}
    trainer |= {"enable_model_summary": False, "max_steps": 4, "callbacks": [checkpoint], "logger": logger}
    told = folder / "given.yaml"
    told.write_text(json.dumps({"trainer": trainer, **given}))
    LightningCLI(*classes, args=["fit", "--config", str(told)])
    (config,) = folder.rglob("config.yaml")
    return config


def path_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


GIVEN = {
    "by class path": {
        "model": {"class_path": path_of(Learner), "init_args": {"width": 5}},
        "data": {"class_path": path_of(Samples), "init_args": {"size": 4}},
    },
    "optimizer of the configuration": {
        "model": {"class_path": path_of(Bare), "init_args": {"width": 5}},
        "data": {"class_path": path_of(Samples)},
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
    },
}


@pytest.fixture(autouse=True)
def _no_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["lightning-curvature"])


@pytest.mark.slow
@pytest.mark.parametrize("name", GIVEN)
def test_values_are_those_of_the_function(name: str, tmp_path: Path) -> None:
    config, out = run(tmp_path, **GIVEN[name]), tmp_path / "found.csv"
    picture = str(tmp_path / "found.png")
    found = measure(str(config), str(tmp_path / "*.ckpt"), out=str(out), options={"k": 2}, picture=picture)
    assert found.steps == STEPS
    samples = Samples(GIVEN[name]["data"].get("init_args", {}).get("size", 8))
    samples.setup("fit")
    monitor, module = HessianSpectrumMonitor(k=2), Learner(5)
    lr = 0.1 if "optimizer" in GIVEN[name] else 0.3
    optimizer = torch.optim.SGD(module.parameters(), lr=lr)
    expected = evaluate_checkpoints(tmp_path, monitor, module, samples.loader, optimizer)
    assert found.curve("lambda_max_threshold") == pytest.approx([2.0 / lr] * 2)
    assert [one.values for one in found.evaluations] == [one.values for one in expected.evaluations]
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(int(r["step"]), float(r["value"])) for r in rows if r["key"] == "lambda_2"] == list(
        zip(STEPS, found.curve("lambda_2"), strict=True)
    )
    assert Path(picture).stat().st_size


def test_classes_that_the_configuration_leaves_out(tmp_path: Path) -> None:
    config = str(run(tmp_path, (Learner, Samples), model={"width": 5}, data={"size": 4}))
    pattern, out = str(tmp_path / "*.ckpt"), str(tmp_path / "found.csv")
    with pytest.raises(ValueError, match=r"^model must be named where the configuration has no class_path of it"):
        measure(config, pattern, out=out)
    names: dict[str, Any] = {"model": path_of(Learner), "data": path_of(Samples)}
    assert measure(config, pattern, out=out, **names).steps == STEPS


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "monitor": ({"monitor": "trace"}, "^monitor must be one of spectrum, .*, got 'trace': 'spectrum' gives λ_max"),
    "option": ({"options": {"kay": 2}}, "^options must be arguments of HessianSpectrumMonitor, got .*'kay'"),
    "needed": ({"monitor": "noise"}, "^options must be arguments of NoiseCovarianceMonitor, got .*'parameter'"),
    "value": ({"options": {"k": 0}}, "^k must be a whole number of at least 1, got 0"),
    "config": ({}, "^config must hold a model, got .* without: give the config.yaml of a run of LightningCLI"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str, tmp_path: Path) -> None:
    options, said = MISTAKES[name]
    (tmp_path / "config.yaml").write_text("trainer: {}")
    with pytest.raises(ValueError, match=said):
        measure(str(tmp_path / "config.yaml"), str(tmp_path / "*.ckpt"), **options)
