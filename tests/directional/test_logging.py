"""What the monitor writes, to whom, and that training can act on it; the same after a checkpoint and from YAML."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

from lightning_curvature import DirectionalCurvatureMonitor
from tests.helpers.runs import YAML_TRAINER, Capture, Classifier, classification, loader, make_trainer, mlp, run
from tests.helpers.tensorboard import charts, layouts

KEYS = {
    "hvp": "lambda_dir",
    "finite_difference": "lambda_fd",
    "kl": "lambda_kl",
    "gauss_newton": "lambda_gn",
    "critical": "critical_sharpness",
}
BESIDE = {"two_over_lr", "headroom", "descent", "update_norm"}


def module(lr: float = 0.3) -> Classifier:
    return Classifier(mlp(4, 6, 3), lambda m: torch.optim.SGD(m.parameters(), lr=lr, momentum=0.5))


def measured(capture: Capture) -> dict[int, dict[str, float]]:
    """Rows of the monitor alone."""
    rows = {
        step: {k: v for k, v in row.items() if k != "train_loss" and k != "epoch"} for step, row in capture.rows.items()
    }
    return {step: row for step, row in rows.items() if row}


@pytest.mark.parametrize(
    "estimators", [None, ("hvp",), ("kl",), ("finite_difference",), ("gauss_newton",), ("critical",), tuple(KEYS)]
)
def test_keys(estimators: Any) -> None:
    options = {} if estimators is None else {"estimators": estimators}
    estimators = estimators or ("kl", "finite_difference")
    outcome = run(
        module(), classification(3), DirectionalCurvatureMonitor(every_n_train_steps=2, prefix="c", **options)
    )
    expected = {KEYS[name] for name in estimators} | {f"{KEYS[name]}_error" for name in estimators} | BESIDE
    if {"kl", "finite_difference"} & set(estimators):
        expected |= {"epsilon"}
    rows = measured(outcome.capture)
    assert list(rows) == [0, 2]
    for row in rows.values():
        assert set(row) == {f"c/{key}" for key in expected}
        assert all(math.isfinite(value) for value in row.values())


def test_values_beside_the_curvatures() -> None:
    outcome = run(module(), classification(3), DirectionalCurvatureMonitor(estimators=["hvp"], every_n_train_steps=1))
    for index, step in enumerate(outcome.steps):
        row, truth = outcome.capture.rows[index], outcome.reference(index)
        norm = math.sqrt(sum(float((step.before[n] - step.after[n]).square().sum()) for n in step.before))
        assert row["curvature/two_over_lr"] == 2 / 0.3
        # float64 sums of 45 parameters; d is the difference of numbers ten times its size.
        assert row["curvature/descent"] == pytest.approx(truth.descent / 0.3, rel=1e-12)
        assert row["curvature/update_norm"] == pytest.approx(norm / 0.3, rel=1e-12)
        assert row["curvature/headroom"] == pytest.approx(2 * truth.descent / truth.hessian, rel=1e-9)
        assert row["curvature/headroom"] * row["curvature/lambda_dir"] == pytest.approx(2 / 0.3, rel=1e-12)


def test_every_logger_and_the_metrics_get_the_same() -> None:
    first, second = Capture(), Capture()
    trainer = make_trainer(DirectionalCurvatureMonitor(every_n_train_steps=2), logger=[first, second])
    trainer.fit(module(), loader(classification(5)))
    assert measured(first) == measured(second)
    for key, value in measured(first)[4].items():
        assert trainer.callback_metrics[key].item() == pytest.approx(value, rel=1e-6)  # kept in float32


def test_without_any_logger() -> None:
    trainer = make_trainer(DirectionalCurvatureMonitor(every_n_train_steps=1))
    trainer.fit(module(), loader(classification(2)))
    assert trainer.callback_metrics["curvature/lambda_kl"].item() > 0.0


@pytest.mark.parametrize("shown", [True, False])
def test_progress_bar(shown: bool) -> None:
    outcome = run(module(), classification(2), DirectionalCurvatureMonitor(every_n_train_steps=1, progress_bar=shown))
    keys = {key for key in outcome.trainer.progress_bar_metrics if key.startswith("curvature")}
    assert keys == ({f"curvature/{key}" for key in ("lambda_kl", "lambda_fd", "headroom")} if shown else set())
    for key in keys:
        assert outcome.trainer.progress_bar_metrics[key] == outcome.capture.rows[1][key]


@pytest.mark.parametrize(("lr", "steps"), [(6.0, 1), (0.01, 5)])
def test_early_stopping_acts_on_the_headroom(lr: float, steps: int) -> None:
    """With a headroom below 1 training ends after its first epoch, of one step; else it goes on to its end."""
    stop = EarlyStopping("curvature/headroom", mode="max", divergence_threshold=1.0, patience=99)
    capture = Capture()
    trainer = make_trainer(DirectionalCurvatureMonitor(every_n_train_steps=1), stop, logger=capture, max_epochs=5)
    trainer.fit(module(lr), loader(classification(1)))
    assert (capture.rows[0]["curvature/headroom"] < 1.0) == (steps == 1)
    assert trainer.global_step == steps


def test_model_checkpoint_keeps_the_best_headroom(tmp_path: Path) -> None:
    capture = Capture()
    keep = ModelCheckpoint(tmp_path, monitor="curvature/headroom", mode="max", save_top_k=1, every_n_train_steps=1)
    trainer = make_trainer(
        DirectionalCurvatureMonitor(every_n_train_steps=1), keep, logger=capture, enable_checkpointing=True
    )
    trainer.fit(module(lr=1.0), loader(classification(6)))
    best = max(row["curvature/headroom"] for row in capture.rows.values())
    assert keep.best_model_score is not None
    assert keep.best_model_score.item() == pytest.approx(best, rel=1e-6)  # float32


def test_tensorboard_layout_draws_each_curvature_with_the_edge(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="run")
    for _ in range(2):
        monitors = [
            DirectionalCurvatureMonitor(estimators=["hvp", "kl"], prefix="short"),
            DirectionalCurvatureMonitor(estimators=["critical"], prefix="long", every_n_train_steps=1),
        ]
        make_trainer(*monitors, logger=logger).fit(module(), loader(classification(2)))
    logger.experiment.flush()
    (layout,) = layouts(logger.log_dir)  # once, for both monitors, in both fits
    assert [category.title for category in layout.category] == ["Curvature"]
    assert charts(layout) == {
        "short: λ and 2/η": ["short/lambda_dir", "short/lambda_kl", "short/two_over_lr"],
        "short: headroom": ["short/headroom"],
        "long: λ and 2/η": ["long/critical_sharpness", "long/two_over_lr"],
        "long: headroom": ["long/headroom"],
    }


def test_monitors_of_distinct_prefixes_have_states_of_their_own() -> None:
    one, two = DirectionalCurvatureMonitor(), DirectionalCurvatureMonitor(prefix="other")
    assert one.state_key != two.state_key
    outcome = run(module(), classification(1), one, two)
    row = measured(outcome.capture)[0]
    assert {k.removeprefix("other/") for k in row if k.startswith("other/")} == {
        k.removeprefix("curvature/") for k in row if k.startswith("curvature/")
    }


# ε and the bracket of the line search are learned along the run: they must come back with it.
LEARNED = {"estimators": tuple(KEYS), "every_n_train_steps": 2}


def test_a_resumed_run_logs_what_the_unbroken_run_does(tmp_path: Path) -> None:
    batches = classification(4, dtype=torch.float32)

    def fit(epochs: int, resume: str | None = None) -> tuple[pl.Trainer, dict[int, dict[str, float]]]:
        capture = Capture()
        trainer = make_trainer(
            DirectionalCurvatureMonitor(**LEARNED),
            logger=capture,
            max_epochs=epochs,
            precision="32-true",  # type: ignore[arg-type]
        )
        network = mlp(4, 6, 3, dtype=torch.float32)
        learner = Classifier(network, lambda m: torch.optim.SGD(m.parameters(), lr=0.3, momentum=0.5))
        trainer.fit(learner, loader(batches), ckpt_path=resume)
        return trainer, measured(capture)

    _, unbroken = fit(3)
    trainer, head = fit(1)
    path = str(tmp_path / "last.ckpt")
    trainer.save_checkpoint(path)
    _, tail = fit(3, resume=path)
    assert list(unbroken) == [0, 2, 4, 6, 8, 10]
    assert len({row["curvature/epsilon"] for row in unbroken.values()}) > 2  # ε did adapt
    assert head | tail == unbroken
    assert list(tail) == [4, 6, 8, 10]


def test_state_goes_round() -> None:
    monitor = DirectionalCurvatureMonitor(**LEARNED)  # type: ignore[arg-type]
    run(module(), classification(3), monitor)
    twin = DirectionalCurvatureMonitor(**LEARNED)  # type: ignore[arg-type]
    twin.load_state_dict(monitor.state_dict())
    assert twin.state_dict() == monitor.state_dict()
    assert twin.state_dict() != DirectionalCurvatureMonitor().state_dict()


def test_a_checkpoint_from_before_is_taken_up() -> None:
    """Its keys and their form: distance ε‖d‖, (κ, its history, offset, its history), start of the search."""
    history = [(0.5, 0.25)]
    saved = {"distance": 0.125, "rounding": (2.0, history, 0.25, history), "critical_start": 4.0}
    monitor = DirectionalCurvatureMonitor(**LEARNED)  # type: ignore[arg-type]
    monitor.load_state_dict(saved)
    assert monitor.state_dict() == saved
    row = measured(run(module(), classification(1), monitor).capture)[0]
    # ε‖d‖, of ‖d‖ = η‖Δθ‖; products of two roundings.
    distance = row["curvature/epsilon"] * row["curvature/update_norm"] * 0.3
    assert distance == pytest.approx(saved["distance"], rel=1e-12)
    growth, first, offset, second = monitor.state_dict()["rounding"]
    assert growth <= 2.0
    assert offset <= 0.25
    assert (first[0], second[0]) == (history[0], history[0])
    assert len(first) == len(second) == 2


class YamlClassifier(Classifier):
    """A module the command line can make."""

    def __init__(self, lr: float = 0.3) -> None:
        super().__init__(mlp(4, 6, 3), lambda m: torch.optim.SGD(m.parameters(), lr=lr))

    def train_dataloader(self) -> DataLoader[Any]:
        return loader(classification(2))


YAML = (
    YAML_TRAINER
    + """\
    - class_path: lightning_curvature.DirectionalCurvatureMonitor
      init_args:
        estimators: [kl, finite_difference, hvp, gauss_newton, critical]
        every_n_train_steps: 1
        epsilon: {epsilon}
        likelihood: categorical
        outputs: network
        optimizer_index: 0
        probe_precision: {precision}
        critical_max_forwards: 12
        prefix: sharp
        progress_bar: true
        on_error: raise
"""
)


@pytest.mark.parametrize(("epsilon", "precision"), [("0.5", "32-true"), ("auto", "null")])
def test_command_line_from_yaml(epsilon: str, precision: str, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(YAML.format(epsilon=epsilon, precision=precision))
    with contextlib.chdir(tmp_path) if hasattr(contextlib, "chdir") else contextlib.nullcontext():
        cli = LightningCLI(YamlClassifier, args=["fit", "--config", str(config)], save_config_callback=None)
    (monitor,) = [c for c in cli.trainer.callbacks if isinstance(c, DirectionalCurvatureMonitor)]
    assert monitor.epsilon == (0.5 if epsilon == "0.5" else "auto")
    assert monitor.probe_precision == (None if precision == "null" else precision)
    assert monitor.estimators == ("kl", "finite_difference", "hvp", "gauss_newton", "critical")
    found = {key for key in cli.trainer.callback_metrics if key.startswith("sharp/")}
    assert {f"sharp/{key}" for key in KEYS.values()} <= found
    assert all(cli.trainer.callback_metrics[f"sharp/{key}"] > 0 for key in KEYS.values())
