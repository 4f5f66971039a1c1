"""What BatchSharpnessMonitor writes, to whom, and that training can act on it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

from lightning_curvature import DirectionalCurvatureMonitor, HessianSpectrumMonitor
from lightning_curvature.batch_sharpness.options import PLATEAUS, QUANTITIES
from lightning_curvature.functional import sharpness_plateaus
from tests.helpers.batch_sharpness import learner, loader, monitor
from tests.helpers.runs import Capture, make_trainer, rows
from tests.helpers.tensorboard import read


def fit(*callbacks: Any, logger: Any = None, module: Any = None, **options: Any) -> Any:
    trainer = make_trainer(*callbacks, logger=logger, **options)
    trainer.fit(module or learner(), loader())
    return trainer


def test_rows_are_those_of_the_optimizer_steps() -> None:
    """Also where a step has several batches, and its own batch is measured before the last of them."""
    capture = Capture()
    follow = monitor("step_sharpness", "ias", every_n_train_steps=1)
    fit(follow, logger=capture, accumulate_grad_batches=2, max_epochs=2)
    for key in ("curvature/ias", "curvature/step_sharpness", "train_loss"):
        assert [step for step, row in sorted(capture.rows.items()) if key in row] == [0, 1, 2, 3], key


def test_eigenvalues_of_mini_batches_are_a_histogram(tmp_path: Path) -> None:
    logger, follow = TensorBoardLogger(tmp_path, name="run"), monitor("lambda_max_b", num_batches=4)
    fit(follow, logger=logger, max_steps=1)
    logger.experiment.flush()
    (event,) = read(logger.log_dir).Histograms("curvature/lambda_max_b_distribution")
    assert follow.result is not None
    found, numbers = follow.result.eigenvalues, follow.result.values()
    assert event.step == 0
    assert event.histogram_value.num == len(found) == numbers["lambda_max_b_batches"] == 4
    assert (event.histogram_value.min, event.histogram_value.max) == (min(found), max(found))
    # Two roundings of each of four values.
    assert sum(found) / 4 == pytest.approx(numbers["lambda_max_b"], rel=1e-15)
    assert min(found) < numbers["lambda_max_b_q10"] < numbers["lambda_max_b_q50"] < numbers["lambda_max_b_q90"]


@pytest.mark.slow
def test_beside_the_other_monitors() -> None:
    """One prefix for all: none sees the others."""

    def run(*callbacks: Any) -> dict[int, dict[str, float]]:
        capture = Capture()
        fit(*callbacks, logger=capture)
        return rows(capture)

    def three() -> list[Any]:
        options: Any = {"every_n_train_steps": 2, "on_error": "raise"}
        return [
            monitor(*QUANTITIES, num_batches=4),
            HessianSpectrumMonitor(**options),
            DirectionalCurvatureMonitor(estimators=("kl",), **options),
        ]

    alone = [run(one) for one in three()]
    for order in (three(), three()[::-1]):
        for step, row in run(*order).items():
            together = {key: value for found in alone for key, value in found[step].items()}
            assert {k: repr(v) for k, v in row.items()} == {k: repr(v) for k, v in together.items()}


def heavy_ball(lr: float, momentum: float) -> Any:
    return learner(lambda m: torch.optim.SGD(m.parameters(), lr=lr, momentum=momentum))


def test_plateaus_of_momentum_are_those_of_the_step() -> None:
    """Logged beside 2/η, with η and β as a scheduler has them; said once a fit."""

    def cycled(module: nn.Module) -> Any:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.4, total_steps=8)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    capture, settings = Capture(), list[tuple[float, float]]()

    class Settings(pl.Callback):
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            settings.extend((group["lr"], group["momentum"]) for group in trainer.optimizers[0].param_groups)

    fit(Settings(), monitor("step_sharpness", every_n_train_steps=1), logger=capture, module=learner(cycled))
    found = rows(capture)
    assert len(found) == 4
    assert len({momentum for _, momentum in settings}) > 2
    for row, (lr, momentum) in zip(found.values(), settings, strict=True):
        assert tuple(row[key] for key in PLATEAUS) == sharpness_plateaus(lr, momentum)
        assert row["plateau_small_batch"] < row["two_over_lr"] < row["plateau_large_batch"]


@pytest.mark.parametrize(
    ("quantities", "momentum", "plateaus"),
    [(("batch_sharpness",), 0.9, True), (("batch_sharpness",), 0.0, False), (("gni", "update_sharpness"), 0.9, False)],
)
def test_where_two_over_lr_is_not_the_plateau_is_said_once(
    quantities: tuple[str, ...], momentum: float, plateaus: bool, caplog: pytest.LogCaptureFixture
) -> None:
    capture = Capture()
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        fit(monitor(*quantities, num_batches=4), logger=capture, module=heavy_ball(0.3, momentum))
    said = [record.getMessage() for record in caplog.records if "2/η" in record.getMessage()]
    assert said == [
        "under momentum batch sharpness does not settle at 2/η, but at plateau_small_batch where batches are small, "
        "and at plateau_large_batch where they are large."
    ] * int(plateaus)
    for row in rows(capture).values():
        assert (set(PLATEAUS) <= row.keys()) is bool(set(PLATEAUS) & row.keys()) is plateaus


def test_other_monitors_chart_before_an_optimizer_is_refused() -> None:
    """TensorBoard's layout is that of all monitors, and made by the first."""
    first, second = monitor("batch_sharpness"), monitor("batch_sharpness", prefix="other", optimizer_index=1)
    with pytest.raises(MisconfigurationException, match="optimizer_index must be below the number of optimizers"):
        fit(first, second, logger=Capture())
