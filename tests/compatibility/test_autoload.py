"""Monitors by an environment variable: nothing without it, what it names with it, and one sentence for a bad one."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import lightning_curvature
from lightning_curvature import (
    BatchSharpnessMonitor,
    DirectionalCurvatureMonitor,
    HessianSpectrumMonitor,
    NoiseCovarianceMonitor,
    StabilizationMonitor,
    autoload,
)
from lightning_curvature.monitors.base import Monitor
from tests.helpers.runs import Capture, classification, make_trainer, mlp
from tests.helpers.runs import Classifier as Learner


def of_trainer(trainer: pl.Trainer) -> list[Monitor]:
    return [one for one in trainer.callbacks if isinstance(one, Monitor)]  # type: ignore[attr-defined]


@pytest.mark.parametrize("value", [None, "", " , "])
def test_nothing_where_nothing_is_asked_for(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(autoload.VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(autoload.VARIABLE, value)
    assert of_trainer(make_trainer()) == []


def test_lightning_knows_the_factory() -> None:
    points = importlib.metadata.entry_points(group="lightning.pytorch.callbacks_factory")
    assert [point.value for point in points if point.name == "lightning_curvature"] == [
        "lightning_curvature.autoload:monitors"
    ]


MEASURED = ("lambda_kl", "lambda_max", "batch_sharpness", "delta_2_subspace", "noise_gamma")


@pytest.mark.slow
def test_a_trainer_has_what_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        autoload.VARIABLE, "directional@2,spectrum, batch_sharpness@3,stabilization,noise=network.0.weight@3"
    )
    capture = Capture()
    trainer = make_trainer(logger=capture)
    *kinds, last, noise = [(type(one), one.every_n_train_steps) for one in of_trainer(trainer)]
    assert kinds == [(DirectionalCurvatureMonitor, 2), (HessianSpectrumMonitor, 200), (BatchSharpnessMonitor, 3)]
    assert last[0] is StabilizationMonitor
    assert noise == (NoiseCovarianceMonitor, 3)
    # Of its 64 samples and eight more.
    data = DataLoader(TensorDataset(*classification(1, 72)[0]), batch_size=18)
    trainer.fit(Learner(mlp(4, 3, 3), lambda m: torch.optim.SGD(m.parameters(), lr=0.1)), data)
    steps = {key: [step for step, row in capture.rows.items() if f"curvature/{key}" in row] for key in MEASURED}
    assert steps == dict(zip(MEASURED, ([0, 2], [0], [0, 3], [4], [0, 3, 4]), strict=True))


def test_two_parameters_have_keys_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(autoload.VARIABLE, "noise=network.0.weight@3, spectrum, noise=network.2.weight")
    first, _, second = of_trainer(make_trainer())
    assert (first.parameter, first.prefix, first.every_n_train_steps) == ("network.0.weight", "curvature", 3)
    assert (second.parameter, second.prefix) == ("network.2.weight", "curvature/network.2.weight")


@pytest.mark.parametrize(
    "value",
    [
        "lambda_max",
        "directional@",
        "directional@often",
        "spectrum@-1",
        "directional spectrum",
        "noise",
        "noise@3",
        "noise=",
        "noise=fc.weight@",
        "spectrum=fc.weight",
    ],
)
def test_bad_values(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(autoload.VARIABLE, value)
    with pytest.raises(
        ValueError, match=r"^LIGHTNING_CURVATURE must hold names from \('directional', .*, got .*unset it"
    ):
        make_trainer()
    monkeypatch.setenv(autoload.VARIABLE, "spectrum@0")
    with pytest.raises(ValueError, match=r"^every_n_train_steps must be a whole number of at least 1, got 0"):
        make_trainer()


def test_the_factory_imports_nothing_unless_asked() -> None:
    """Every Trainer of the environment calls it."""
    script = (
        "import sys; from lightning_curvature import autoload; assert autoload.monitors() == []; "
        "print([name for name in sys.modules if name.startswith('lightning_curvature.')], 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['lightning_curvature.autoload'] False"


def test_public_names() -> None:
    assert set(lightning_curvature.__all__) <= set(dir(lightning_curvature))
    for name in lightning_curvature.__all__:
        assert getattr(lightning_curvature, name).__name__ == name
    for room in ("callbacks", "functional", "linalg", "metrics", "operators"):
        assert room in dir(lightning_curvature)
        assert getattr(lightning_curvature, room).__name__ == f"lightning_curvature.{room}"
    assert lightning_curvature.__version__ == importlib.metadata.version("lightning-curvature")
    with pytest.raises(AttributeError, match="module 'lightning_curvature' has no attribute 'Nothing'"):
        _ = lightning_curvature.Nothing  # type: ignore[attr-defined]
