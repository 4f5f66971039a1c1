"""What BatchSharpnessMonitor writes, to whom, and that training can act on it."""

from __future__ import annotations

import contextlib
import csv
import math
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.utils.data import DataLoader

from lightning_curvature import BatchSharpnessMonitor, DirectionalCurvatureMonitor, HessianSpectrumMonitor
from lightning_curvature.batch_sharpness.options import QUANTITIES
from tests.helpers.batch_sharpness import DRAWN, learner, loader, monitor, sgd
from tests.helpers.runs import YAML_TRAINER, Capture, Classifier, make_trainer, mlp, rows
from tests.helpers.tensorboard import charts, layouts, read


def keys(*quantities: str) -> set[str]:
    """Those written for some quantities."""
    found = {f"{name}{end}" for name in quantities for end in ("", "_stderr")} | {"two_over_lr"}
    drawn = set(quantities) & set(DRAWN)
    found |= {"lambda_max_b_unconverged"} if "lambda_max_b" in drawn else set()
    return found | {f"{name}_batches" for name in drawn} | ({"zero_gradient_batches"} if drawn else set())


def fit(*callbacks: Any, logger: Any = None, module: Any = None, **options: Any) -> Any:
    trainer = make_trainer(*callbacks, logger=logger, **options)
    trainer.fit(module or learner(), loader())
    return trainer


@pytest.mark.parametrize("quantities", [*((name,) for name in QUANTITIES), QUANTITIES, ("ias", "ias")])
def test_keys(quantities: tuple[str, ...]) -> None:
    capture = Capture()
    fit(monitor(*quantities, prefix="c/d", every_n_train_steps=3), logger=capture)
    found = rows(capture, "c/d")
    assert list(found) == [0, 3]
    for row in found.values():
        assert set(row) == keys(*quantities)
        # One draw has no standard error.
        assert {key for key, value in row.items() if math.isnan(value)} == {"step_sharpness_stderr"} & set(row)


def test_every_logger_and_the_metrics_get_the_same(tmp_path: Path) -> None:
    capture, table = Capture(), CSVLogger(tmp_path)
    trainer = fit(monitor(*QUANTITIES), logger=[capture, table])
    with (Path(table.log_dir) / "metrics.csv").open() as file:
        written = {int(row["step"]): row for row in csv.DictReader(file) if row["curvature/ias"]}
    assert list(written) == [0, 2]
    for step, row in rows(capture).items():
        for key, value in row.items():
            assert float(written[step][f"curvature/{key}"]) == pytest.approx(value, rel=0.0, nan_ok=True)
    for key, value in rows(capture)[2].items():
        # Kept in float32.
        found = trainer.callback_metrics[f"curvature/{key}"].item()
        assert found == pytest.approx(value, rel=1e-6, nan_ok=True)


def test_rows_are_those_of_the_optimizer_steps() -> None:
    """Also where a step has several batches, and its own batch is measured before the last of them."""
    capture = Capture()
    follow = monitor("step_sharpness", "ias", every_n_train_steps=1)
    fit(follow, logger=capture, accumulate_grad_batches=2, max_epochs=2)
    for key in ("curvature/ias", "curvature/step_sharpness", "train_loss"):
        assert [step for step, row in sorted(capture.rows.items()) if key in row] == [0, 1, 2, 3], key


@pytest.mark.parametrize("shown", [True, False])
def test_progress_bar_metrics(shown: bool) -> None:
    capture = Capture()
    trainer = fit(monitor("ias", "step_sharpness", progress_bar=shown), logger=capture)
    found = {k: v for k, v in trainer.progress_bar_metrics.items() if k.startswith("curvature")}
    last = {f"curvature/{key}": rows(capture)[2][key] for key in ("ias", "step_sharpness")}
    assert found == (last if shown else {})


@pytest.mark.parametrize(("bound", "steps"), [(1e-3, 4), (1e6, 12)])
def test_early_stopping_acts_on_the_sharpness(bound: float, steps: int) -> None:
    stop = EarlyStopping("curvature/ias", mode="min", divergence_threshold=bound, patience=99)
    capture = Capture()
    trainer = fit(monitor("ias"), stop, logger=capture, max_epochs=3)
    assert 1e-3 < rows(capture)[0]["ias"] < 1e6
    assert trainer.global_step == steps


def test_tensorboard(tmp_path: Path) -> None:
    logger, capture = TensorBoardLogger(tmp_path, name="run"), Capture()
    fit(monitor("batch_sharpness", "step_sharpness"), logger=[logger, capture])
    logger.experiment.flush()
    events = read(logger.log_dir)
    for key in ("batch_sharpness", "batch_sharpness_stderr", "batch_sharpness_batches", "step_sharpness"):
        written = {event.step: event.value for event in events.Scalars(f"curvature/{key}")}
        # Event files hold float32.
        assert written == {step: pytest.approx(row[key], rel=1e-6) for step, row in rows(capture).items()}
    (layout,) = layouts(logger.log_dir)
    assert charts(layout) == {
        "curvature: mini-batch sharpness and 2/η": [
            "curvature/batch_sharpness",
            "curvature/step_sharpness",
            "curvature/two_over_lr",
        ]
    }


def test_beside_the_other_monitors() -> None:
    """One prefix for all: none sees the others."""

    def run(*callbacks: Any) -> dict[int, dict[str, float]]:
        capture = Capture()
        fit(*callbacks, logger=capture)
        return rows(capture)

    def three() -> list[Any]:
        options: Any = {"every_n_train_steps": 2, "on_error": "raise"}
        return [
            monitor(*QUANTITIES),
            HessianSpectrumMonitor(**options),
            DirectionalCurvatureMonitor(estimators=("kl",), **options),
        ]

    alone = [run(one) for one in three()]
    for order in (three(), three()[::-1]):
        for step, row in run(*order).items():
            together = {key: value for found in alone for key, value in found[step].items()}
            assert {k: repr(v) for k, v in row.items()} == {k: repr(v) for k, v in together.items()}


def test_two_monitors_of_distinct_prefixes() -> None:
    """Step sharpness often, batch sharpness now and then."""
    often, seldom = monitor("step_sharpness", every_n_train_steps=1, prefix="often"), monitor("ias")
    assert often.state_key != seldom.state_key
    capture = Capture()
    fit(often, seldom, logger=capture)
    assert (list(rows(capture, "often")), list(rows(capture))) == ([0, 1, 2, 3], [0, 2])


class YamlClassifier(Classifier):
    """A module the command line can make."""

    def __init__(self) -> None:
        super().__init__(mlp(4, 3, 3), sgd)

    def train_dataloader(self) -> DataLoader[Any]:
        return loader()


YAML = (
    YAML_TRAINER
    + """\
    - class_path: lightning_curvature.BatchSharpnessMonitor
      init_args:
        quantities: [{quantities}]
        every_n_train_steps: 2
        num_batches: 8
        min_batches: 4
        relative_error: 0.1
        batch_size: {size}
        curvature: {curvature}
        probe_samples: {samples}
        probe_dataloader: null
        micro_batch_size: 2
        tolerance: 0.1
        outputs: network
        objective: null
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
    ("size", "curvature", "samples", "precision"),
    [("5", "gauss_newton", "9", "32-true"), ("null", "hessian", "null", "null")],
)
def test_command_line_from_yaml(size: str, curvature: str, samples: str, precision: str, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    options = {"size": size, "curvature": curvature, "samples": samples, "precision": precision}
    config.write_text(YAML.format(quantities=", ".join(QUANTITIES), **options))
    with contextlib.chdir(tmp_path) if hasattr(contextlib, "chdir") else contextlib.nullcontext():
        cli = LightningCLI(YamlClassifier, args=["fit", "--config", str(config)], save_config_callback=None)
    (follow,) = [c for c in cli.trainer.callbacks if isinstance(c, BatchSharpnessMonitor)]
    assert follow.quantities == QUANTITIES
    assert follow.batch_size == (None if size == "null" else 5)
    assert follow.probe_samples == (None if samples == "null" else 9)
    assert follow.probe_precision == (None if precision == "null" else "32-true")
    found = {key.removeprefix("sharp/") for key in cli.trainer.callback_metrics if key.startswith("sharp/")}
    assert found == keys(*QUANTITIES)
    assert math.isfinite(cli.trainer.callback_metrics["sharp/batch_sharpness"])
