"""What NoiseCovarianceMonitor writes, to whom: loggers, metrics, TensorBoard's charts and pictures, text and table."""

from __future__ import annotations

import contextlib
import csv
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.utils.data import DataLoader

from lightning_curvature import CurvatureWarning, NoiseCovarianceMonitor
from lightning_curvature.noise.options import KEYS, QUANTITIES
from tests.helpers.noise import samples
from tests.helpers.runs import YAML_TRAINER, Capture, Classifier, make_trainer, mlp, rows, warned
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


@pytest.mark.parametrize("quantities", [QUANTITIES, QUANTITIES[:-1], *((one,) for one in QUANTITIES)], ids=str)
def test_keys(quantities: Any) -> None:
    capture, follow = Capture(), monitor(prefix="c/d", quantities=quantities, micro_batch_size=22)
    trainer = fit(follow, logger=capture)
    (found,) = rows(capture, "c/d").values()
    assert set(found) == {key for quantity in quantities for key in KEYS[quantity]}
    assert all(math.isfinite(value) for value in found.values())
    assert follow.result is not None
    assert follow.result.values(quantities) == found
    for key, value in found.items():
        # callback_metrics hold float32.
        assert trainer.callback_metrics[f"c/d/{key}"].item() == pytest.approx(value, rel=1e-6)
    charted = {key for keys in follow.charts().values() for key in keys}
    assert charted <= {f"c/d/{key}" for key in found}


def test_charts() -> None:
    assert monitor(prefix="a", quantities=QUANTITIES).charts() == {
        "a: noise exponent γ": [
            f"a/noise_gamma{end}" for end in ("", "_awd", *(f"_awd_{n}" for n in ("raw", "hh", "hh_sd", "hh_sd_wd")))
        ]
        + ["a/noise_gamma_awd_hh_sd_wd_li"],
        "a: noise commutativity and chance": ["a/noise_commutativity_relative", "a/noise_commutativity_random"],
        "a: noise coupling and chance": ["a/noise_coupling", "a/noise_coupling_random"],
    }
    assert monitor(quantities=("noise_spearman",)).charts() == {}


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


def test_others_can_watch_it(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, monitor="curvature/noise_gamma", mode="max", every_n_train_steps=1)
    stop = EarlyStopping("curvature/noise_alignment", patience=1, min_delta=1e9, check_on_train_epoch_end=True)
    capture = Capture()
    trainer = fit(monitor(every_n_train_steps=1), keep, stop, logger=capture, enable_checkpointing=True, max_epochs=9)
    assert trainer.global_step == 6
    # What is measured after the last step is measured after the last checkpoint.
    best = max(row["noise_gamma"] for step, row in rows(capture).items() if step < 6)
    assert keep.best_model_score is not None
    assert keep.best_model_score.item() == pytest.approx(best, rel=1e-6)  # float32


def test_pictures(tmp_path: Path) -> None:
    """At each measured step one of each."""
    logger = TensorBoardLogger(tmp_path, name="run")
    fit(monitor(at_steps=(1,)), logger=logger)
    logger.experiment.flush()
    events = read(logger.log_dir)
    assert sorted(events.Tags()["images"]) == [f"curvature/{name}" for name in PICTURES]
    for name in PICTURES:
        images = events.Images(f"curvature/{name}")
        assert [image.step for image in images] == [1, 3]
        assert len({image.encoded_image_string for image in images}) == 2
        assert all(image.encoded_image_string.startswith(b"\x89PNG") for image in images)
    assert [event.step for event in events.Scalars("curvature/noise_gamma")] == [1, 3]


@pytest.mark.parametrize("quantities", [("noise_spearman",), ("noise_gamma_awd",), ("noise_awd_chain",)])
@pytest.mark.parametrize("name", ["network.0.weight", "network.2.bias"])
@pytest.mark.filterwarnings("ignore::lightning_curvature.CurvatureWarning", "error::RuntimeWarning")
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


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"] + ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    logger, follow = TensorBoardLogger(tmp_path, name="run"), monitor(at_steps=(1,))
    assert warned(lambda: fit(follow, logger=logger)) == [
        "the noise covariance comes without pictures: install matplotlib to have them."
    ]
    assert follow.result is not None
    assert follow.result.draw() is follow.result.draw_matrices() is None
    logger.experiment.flush()
    assert read(logger.log_dir).Tags()["images"] == []
    # Nor is it missed where nobody would see it.
    assert warned(lambda: fit(monitor(), logger=False)) == []


def test_the_users_figures_are_left_alone(tmp_path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, backend = plt.figure(), plt.get_backend()
    before = plt.get_fignums()
    fit(monitor(), logger=TensorBoardLogger(tmp_path))
    assert plt.gcf() is figure
    assert (plt.get_fignums(), plt.get_backend()) == (before, backend)
    plt.close(figure)


def test_text_and_table(tmp_path: Path) -> None:
    follow = monitor(quantities=QUANTITIES)
    fit(follow, logger=CSVLogger(tmp_path))
    result = follow.result
    assert result is not None
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


class YamlClassifier(Classifier):
    """A module the command line can make."""

    def __init__(self, lr: float = 0.3) -> None:
        super().__init__(mlp(4, 6, 3), lambda m: torch.optim.SGD(m.parameters(), lr=lr))

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(samples(), batch_size=8)


YAML = (
    YAML_TRAINER
    + """\
    - class_path: lightning_curvature.NoiseCovarianceMonitor
      init_args:
        parameter: network.0.weight
        quantities: [noise_gamma, noise_awd_chain]
        top: {top}
        batch_size: {top}
        haar_draws: 2
        pairing: null
        at_end: true
        at_steps: [1]
        every_n_train_steps: {every}
        probe_samples: 20
        probe_dataloader: null
        micro_batch_size: {every}
        objective: null
        optimizer_index: 0
        probe_mode: eval
        probe_precision: {precision}
        seed: 3
        prefix: noise
        on_error: raise
"""
)


@pytest.mark.parametrize(
    "given",
    [{"top": "null", "every": "null", "precision": "32-true"}, {"top": "5", "every": "10", "precision": "null"}],
)
@pytest.mark.filterwarnings("ignore:samples must have a partner")
def test_command_line_from_yaml(given: dict[str, str], tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(YAML.format(**given))
    with contextlib.chdir(tmp_path) if hasattr(contextlib, "chdir") else contextlib.nullcontext():
        cli = LightningCLI(YamlClassifier, args=["fit", "--config", str(config)], save_config_callback=None)
    (follow,) = [c for c in cli.trainer.callbacks if isinstance(c, NoiseCovarianceMonitor)]
    assert follow.result is not None
    assert (len(follow.result.curvatures), follow.result.batch_size) == ((10, 8) if given["top"] == "null" else (5, 5))
    found = {key.removeprefix("noise/") for key in cli.trainer.callback_metrics if key.startswith("noise/")}
    assert found == {*KEYS["noise_gamma"], *KEYS["noise_awd_chain"]}
