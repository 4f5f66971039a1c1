"""What BatchSharpnessMonitor writes, to whom, and that training can act on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_curvature import DirectionalCurvatureMonitor, HessianSpectrumMonitor
from lightning_curvature.batch_sharpness.options import QUANTITIES
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
