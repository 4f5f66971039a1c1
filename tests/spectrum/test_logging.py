"""What HessianSpectrumMonitor writes, to whom, and that training can act on it."""

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

from lightning_curvature import DirectionalCurvatureMonitor, HessianSpectrumMonitor
from lightning_curvature.reporting import loggers as reporting
from tests.helpers.runs import YAML_TRAINER, Capture, Classifier, make_trainer, mlp, rows, warned
from tests.helpers.spectrum import TOLERANCE, monitor, whole
from tests.helpers.spectrum_setups import loader, module
from tests.helpers.tensorboard import charts, layouts, read
from tests.oracles.hessian_spectrum import Curvature, Moments, check_eigenvalue

ALL = (
    "lambda_max",
    "lambda_min",
    "hessian_trace",
    "spectral_density",
    "gauss_newton_lambda_max",
    "preconditioned_lambda_max",
    "second_moment_contraction",
)


def with_error(*keys: str) -> set[str]:
    return {f"{key}{suffix}" for key in keys for suffix in ("", "_error", "_converged")}


KEYS: dict[str, set[str]] = {
    "lambda_max": with_error("lambda_max") | {"lambda_max_upper", "lambda_max_threshold"},
    "lambda_min": with_error("lambda_min"),
    "hessian_trace": {"hessian_trace", "hessian_trace_stderr"},
    "spectral_density": set(),
    "gauss_newton_lambda_max": with_error("gauss_newton_lambda_max"),
    "preconditioned_lambda_max": with_error("preconditioned_lambda_max") | {"preconditioned_lambda_max_threshold"},
    "second_moment_contraction": with_error("second_moment_contraction") | {"second_moment_excess"},
}


def fit(*callbacks: Any, logger: Any = None, learner: Any = None, **options: Any) -> Any:
    trainer = make_trainer(*callbacks, logger=logger, **({"max_epochs": 2} | options))
    trainer.fit(learner or module(), loader())
    return trainer


@pytest.mark.parametrize("quantities", [*((name,) for name in ALL), ALL])
def test_keys(quantities: tuple[str, ...]) -> None:
    capture = Capture()
    fit(monitor(*quantities, prefix="c/d", every_n_train_steps=3), logger=capture)
    found = rows(capture, "c/d")
    expected = set().union(*(KEYS[name] for name in quantities))
    assert list(found) == ([0, 3, 6] if expected else [])
    for row in found.values():
        assert set(row) == expected
        assert all(math.isfinite(value) for value in row.values())


def test_k_eigenvalues_have_numbers_for_names() -> None:
    capture = Capture()
    fit(monitor("lambda_max", k=3, every_n_train_steps=8), logger=capture)
    assert set(rows(capture)[0]) == with_error("lambda_max", "lambda_2", "lambda_3") | KEYS["lambda_max"]


def test_every_logger_and_the_metrics_get_the_same(tmp_path: Path) -> None:
    capture, table = Capture(), CSVLogger(tmp_path)
    trainer = fit(monitor("lambda_max", "hessian_trace"), logger=[capture, table])
    with (Path(table.log_dir) / "metrics.csv").open() as file:
        written = {int(row["step"]): row for row in csv.DictReader(file) if row["curvature/lambda_max"]}
    assert list(written) == [0, 2, 4, 6]
    for step, row in rows(capture).items():
        for key, value in row.items():
            assert float(written[step][f"curvature/{key}"]) == value
    for key, value in rows(capture)[6].items():
        assert trainer.callback_metrics[f"curvature/{key}"].item() == pytest.approx(value, rel=1e-6)  # kept in float32


@pytest.mark.parametrize("shown", [True, False])
def test_progress_bar_metrics(shown: bool) -> None:
    capture = Capture()
    trainer = fit(monitor("lambda_max", "lambda_min", k=2, progress_bar=shown), logger=capture)
    found = {k: v for k, v in trainer.progress_bar_metrics.items() if k.startswith("curvature")}
    last = {key: rows(capture)[6][key] for key in ("lambda_max", "lambda_min")}
    assert found == ({f"curvature/{key}": value for key, value in last.items()} if shown else {})


@pytest.mark.parametrize(("bound", "steps"), [(0.1, 4), (1e6, 12)])
def test_early_stopping_acts_on_the_sharpness(bound: float, steps: int) -> None:
    stop = EarlyStopping("curvature/lambda_max", mode="min", divergence_threshold=bound, patience=99)
    capture = Capture()
    trainer = fit(monitor("lambda_max"), stop, logger=capture, max_epochs=3)
    assert rows(capture)[0]["lambda_max"] > 0.1
    assert trainer.global_step == steps


def test_model_checkpoint_keeps_the_flattest(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, monitor="curvature/lambda_max", mode="min", every_n_train_steps=1)
    capture = Capture()
    fit(monitor("lambda_max", every_n_train_steps=1), keep, logger=capture, enable_checkpointing=True)
    best = min(row["lambda_max"] for row in rows(capture).values())
    assert keep.best_model_score is not None
    assert keep.best_model_score.item() == pytest.approx(best, rel=1e-6)  # float32


def test_tensorboard(tmp_path: Path) -> None:
    logger, capture = TensorBoardLogger(tmp_path, name="run"), Capture()
    follow = monitor("lambda_max", "spectral_density", "preconditioned_lambda_max", k=2)
    make = lambda m: torch.optim.AdamW(m.parameters(), lr=0.01)  # noqa: E731
    learner = module(make)
    moments = Moments()
    fit(moments, follow, logger=[logger, capture], learner=learner)
    logger.experiment.flush()
    events = read(logger.log_dir)
    for key in ("lambda_max", "lambda_2", "lambda_max_error", "preconditioned_lambda_max"):
        written = {event.step: event.value for event in events.Scalars(f"curvature/{key}")}
        for step, row in rows(capture).items():
            # Event files hold float32.
            assert written[step] == pytest.approx(row[key], rel=1e-6, nan_ok=True)
        assert list(written) == [0, 2, 4, 6]
    histograms = events.Histograms("curvature/spectral_density")
    assert [event.step for event in histograms] == [0, 2, 4, 6]
    for event in histograms:
        curvature = Curvature(learner.network, learner.loss, moments.all[event.step])
        values = torch.linalg.eigvalsh(curvature.hessian(whole()))
        found = event.histogram_value
        assert found.num == len(values) == 51
        assert sum(found.bucket) == pytest.approx(51.0, rel=1e-6)
        # All 51 directions are found by two starts of 40 steps: the extremes are the eigenvalues themselves, to 1e-4.
        assert found.max == pytest.approx(float(values[-1]), rel=1e-4)
        assert found.min == pytest.approx(float(values[0]), rel=1e-4)
        # Two samples of the trace of what is left beside λ_max and λ_2, of m numbers: four standard deviations.
        rest = values[:-2]
        deviation = len(rest) * (2.0 / (len(rest) + 2) * float(rest.var(unbiased=False)) / 2.0) ** 0.5
        assert abs(found.sum - float(values.sum())) <= 4.0 * deviation
    pictures = events.Images("curvature/spectral_density_picture")
    assert [event.step for event in pictures] == [0, 2, 4, 6]
    for picture in pictures:
        assert (picture.width, picture.height) == (640, 360)
        assert picture.encoded_image_string.startswith(b"\x89PNG")
    assert len({picture.encoded_image_string for picture in pictures}) == 4
    (layout,) = layouts(logger.log_dir)
    assert charts(layout) == {
        "curvature: λ_max and its threshold": [
            "curvature/lambda_max",
            "curvature/lambda_2",
            "curvature/lambda_max_threshold",
        ],
        "curvature: preconditioned λ_max": [
            "curvature/preconditioned_lambda_max",
            "curvature/preconditioned_lambda_max_threshold",
        ],
    }


def test_density_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"] + ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    logger = TensorBoardLogger(tmp_path, name="run")
    said = warned(lambda: fit(monitor("spectral_density"), logger=logger))
    assert said == [
        "the spectral density comes without a picture: install matplotlib to have one beside the histogram."
    ]
    logger.experiment.flush()
    events = read(logger.log_dir)
    assert len(events.Histograms("curvature/spectral_density")) == 4
    assert events.Tags()["images"] == []


@pytest.mark.parametrize("shown", [True, False])
def test_density_without_tensorboard_is_said(shown: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(reporting, "rank_zero_info", said.append)
    fit(monitor("spectral_density"), logger=TensorBoardLogger(tmp_path) if shown else CSVLogger(tmp_path))
    sentence = (
        "'spectral_density' is written to TensorBoard alone, and this Trainer has no TensorBoardLogger: give it one."
    )
    assert said == ([] if shown else [sentence])


def test_density_leaves_the_users_figures_alone(tmp_path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, backend = plt.figure(), plt.get_backend()
    before = plt.get_fignums()
    fit(monitor("spectral_density"), logger=TensorBoardLogger(tmp_path))
    assert plt.gcf() is figure
    assert plt.get_fignums() == before
    assert plt.get_backend() == backend
    plt.close(figure)


def test_beside_the_directional_monitor() -> None:
    """One prefix for both: neither sees the other."""

    def run(*callbacks: Any) -> tuple[dict[int, dict[str, float]], Any, Any]:
        capture, moments, learner = Capture(), Moments(), module()
        fit(moments, *callbacks, logger=capture, learner=learner)
        return rows(capture), moments, learner

    def directional() -> DirectionalCurvatureMonitor:
        return DirectionalCurvatureMonitor(estimators=("hvp", "kl"), every_n_train_steps=2, on_error="raise")

    alone, _, _ = run(directional())
    spectrum_alone, _, _ = run(monitor("lambda_max", "gauss_newton_lambda_max"))
    for first_is_spectrum in (True, False):
        pair = [monitor("lambda_max", "gauss_newton_lambda_max"), directional()]
        both, moments, learner = run(*(pair if first_is_spectrum else pair[::-1]))
        assert list(both) == [0, 2, 4, 6]
        for step, row in both.items():
            assert row == alone[step] | spectrum_alone[step]  # bit for bit
            hessian = Curvature(learner.network, learner.loss, moments.all[step]).hessian(whole())
            check_eigenvalue(row, "lambda_max", hessian, 0, TOLERANCE)


def test_monitors_of_distinct_prefixes_have_states_of_their_own() -> None:
    one, two = monitor("lambda_max"), monitor("lambda_max", prefix="held_out", seed=1)
    assert one.state_key != two.state_key
    capture = Capture()
    fit(one, two, logger=capture)
    for a, b in zip(rows(capture).values(), rows(capture, "held_out").values(), strict=True):
        # Both find the eigenvalue to 1e-12.
        assert a["lambda_max"] == pytest.approx(b["lambda_max"], rel=1e-11)


class YamlClassifier(Classifier):
    """A module the command line can make."""

    def __init__(self, lr: float = 0.3) -> None:
        super().__init__(mlp(4, 6, 3), lambda m: torch.optim.SGD(m.parameters(), lr=lr))

    def train_dataloader(self) -> DataLoader[Any]:
        return loader()


YAML = (
    YAML_TRAINER
    + """\
    - class_path: lightning_curvature.HessianSpectrumMonitor
      init_args:
        quantities: [{quantities}]
        k: 2
        every_n_train_steps: 2
        probe_samples: {samples}
        probe_dataloader: null
        micro_batch_size: 7
        tolerance: 1.0e-2
        max_products: 30
        trace_error: 0.1
        density_starts: 1
        density_steps: 10
        products: auto
        keep_graph: {keep}
        save_eigenvectors: false
        outputs: network
        optimizer_index: 0
        probe_mode: eval
        probe_precision: {precision}
        seed: 3
        prefix: sharp
        progress_bar: true
        on_error: raise
"""
)


@pytest.mark.parametrize(
    ("samples", "keep", "precision"), [("20", "true", "32-true"), ("null", "auto", "null"), ("20", "false", "null")]
)
def test_command_line_from_yaml(samples: str, keep: str, precision: str, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(YAML.format(quantities=", ".join(ALL), samples=samples, keep=keep, precision=precision))
    with contextlib.chdir(tmp_path) if hasattr(contextlib, "chdir") else contextlib.nullcontext():
        cli = LightningCLI(YamlClassifier, args=["fit", "--config", str(config)], save_config_callback=None)
    (follow,) = [c for c in cli.trainer.callbacks if isinstance(c, HessianSpectrumMonitor)]
    assert follow.quantities == ALL
    assert follow.probe_samples == (None if samples == "null" else 20)
    assert follow.probe_precision == (None if precision == "null" else "32-true")
    assert follow.options.keep_graph is {"true": True, "false": False}.get(keep, follow.options.keep_graph)
    assert (follow.options.keep_graph == "auto") == (keep == "auto")
    found = {key.removeprefix("sharp/") for key in cli.trainer.callback_metrics if key.startswith("sharp/")}
    assert found == set().union(*KEYS.values()) | with_error("lambda_2")
    assert all(math.isfinite(cli.trainer.callback_metrics[f"sharp/{key}"]) for key in found)
