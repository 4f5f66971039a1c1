"""What NoiseCovarianceMonitor says of its route, draws and prints, beyond what every monitor does."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.utils.data import DataLoader

from lightning_curvature import CurvatureWarning, NoiseCovarianceMonitor
from lightning_curvature.noise.options import QUANTITIES
from tests.helpers.noise import samples
from tests.helpers.runs import Capture, Classifier, make_trainer, mlp, rows, warned
from tests.helpers.setups import sgd
from tests.helpers.tensorboard import read

PICTURES = ("noise_matrices", "noise_scatter")


def monitor(name: str = "network.0.weight", **options: Any) -> NoiseCovarianceMonitor:
    return NoiseCovarianceMonitor(parameter=name, **({"on_error": "raise"} | options))


def fit(*callbacks: Any, logger: Any = None, **options: Any) -> Any:
    """Three steps an epoch."""
    torch.manual_seed(3)  # of shuffling
    trainer = make_trainer(*callbacks, logger=logger, **options)
    trainer.fit(Classifier(mlp(4, 6, 3), sgd), DataLoader(samples(), batch_size=8, shuffle=True))
    return trainer


def test_at_several_steps_and_its_route_once(informed: Any) -> None:
    capture, follow = Capture(), monitor(every_n_train_steps=3, at_steps=(1, 99))
    fit(follow, logger=capture, max_epochs=2)
    found = rows(capture)
    assert list(found) == [0, 1, 3, 6]
    assert len({row["noise_gamma"] for row in found.values()}) == 4
    assert informed() == [
        "noise covariance of 'network.0.weight': Kronecker route, no Hessian of a single sample is formed."
    ]
    fit(follow, max_epochs=1)  # another fit
    assert len(informed()) == 2


@pytest.mark.parametrize("quantities", [("noise_spearman",), ("noise_gamma_awd",), ("noise_awd_chain",)])
@pytest.mark.parametrize("name", ["network.0.weight", "network.2.bias"])
@pytest.mark.filterwarnings("ignore::lightning_curvature.CurvatureWarning", "error::RuntimeWarning")
@pytest.mark.thinned(6)
def test_pictures_of_what_there_is(quantities: Any, name: str, tmp_path: Path) -> None:
    """With no fit, one of duality alone, and three directions."""
    logger = TensorBoardLogger(tmp_path, name="run")
    fit(monitor(name, quantities=quantities), logger=logger)
    logger.experiment.flush()
    assert len(read(logger.log_dir).Tags()["images"]) == 2


@pytest.mark.filterwarnings("ignore::lightning_curvature.CurvatureWarning", "error::RuntimeWarning")
def test_pictures_of_nothing(tmp_path: Path) -> None:
    """One sample: no noise, and its pictures are drawn all the same."""
    logger = TensorBoardLogger(tmp_path, name="run")
    fit(monitor(probe_samples=1), logger=logger)
    logger.experiment.flush()
    assert len(read(logger.log_dir).Tags()["images"]) == 2


@pytest.mark.slow
def test_two_monitors(tmp_path: Path) -> None:
    """Of distinct prefixes, on two parameters: each writes what it writes alone."""
    one, two = (lambda: monitor()), (lambda: monitor("network.2.weight", prefix="head"))
    assert one().state_key != two().state_key
    alone = {}
    for make in (one, two):
        capture, follow = Capture(), make()
        fit(follow, logger=capture)
        alone[follow.prefix] = rows(capture, follow.prefix)
    logger, capture = TensorBoardLogger(tmp_path, name="run"), Capture()
    fit(one(), two(), logger=[capture, logger])
    for prefix, expected in alone.items():
        assert rows(capture, prefix) == expected
    logger.experiment.flush()
    tags = read(logger.log_dir).Tags()["images"]
    assert set(tags) == {f"{prefix}/{name}" for prefix in alone for name in PICTURES}


def test_charts_of_what_there_is() -> None:
    assert monitor(quantities=("noise_spearman",)).charts(make_trainer()) == {}


def test_without_matplotlib_where_nobody_would_see_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"] + ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    follow = monitor()
    assert warned(lambda: fit(follow, logger=False)) == []
    assert follow.result is not None
    assert follow.result.draw() is follow.result.draw_matrices() is None


def test_text_and_table(tmp_path: Path) -> None:
    follow, capture = monitor(quantities=QUANTITIES), Capture()
    fit(follow, logger=[CSVLogger(tmp_path), capture])
    result = follow.result
    assert result is not None
    assert rows(capture) == {3: result.values(QUANTITIES)}
    text = str(result)
    assert text.startswith("network.0.weight: D = 24, 10 directions, 22 samples, b = 8, kronecker route\n")
    words = ("γ by duality", "commutativity", "alignment", "Spearman", "coupling", "duality", "  raw", "  hh_sd_wd_li")
    assert [word for word in words if word not in text] == []
    result.to_csv(tmp_path / "table.csv")
    with open(tmp_path / "table.csv", newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [float(row["curvature"]) for row in table] == result.curvatures.tolist()
    assert [float(row["variance"]) for row in table] == result.variances.tolist()
    assert [float(row["variance_raw"]) for row in table] == result.chain["raw"].diagonal.tolist()
    with pytest.warns(CurvatureWarning):
        fit(few := monitor("network.2.bias", quantities=QUANTITIES))
    assert "no noise_awd_chain: it exists for the weight of a linear layer" in str(few.result)
