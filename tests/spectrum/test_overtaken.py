"""A search that goes on from an eigenvector that is not the largest any more: the density of the same step tells."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_curvature import HessianSpectrumMonitor
from tests.helpers.runs import Capture, Classifier, make_trainer, mlp, rows
from tests.helpers.spectrum import TOLERANCE, monitor
from tests.helpers.spectrum_runs import batches, hessian, sgd
from tests.oracles.hessian_spectrum import Moments, check_eigenvalue

STEP = 2


class Misleads(pl.Callback):
    """Gives the search of one step the second eigenvector to go on from. Stands between the moments and the monitor."""

    def __init__(self, follow: HessianSpectrumMonitor, moments: Moments, places: list[int]) -> None:
        self.follow, self.moments, self.places = follow, moments, places

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.global_step == STEP:
            values, vectors = torch.linalg.eigh(hessian(pl_module, self.moments, STEP))
            tracker = self.follow._measurement.trackers["hessian"]
            assert tracker._before is not None
            chosen = [vectors[:, place].clone() for place in self.places]
            tracker._before = replace(tracker._before, values=values[self.places], vectors=chosen)


@pytest.mark.parametrize("end", ["lambda_max", "lambda_min"])
@pytest.mark.parametrize("density", [True, False])
def test_density_makes_the_search_begin_anew(end: str, density: bool) -> None:
    quantities = (end, "spectral_density") if density else (end,)
    follow, moments, capture = monitor(*quantities, density_steps=20), Moments(), Capture()
    misleads = Misleads(follow, moments, [-2 if end == "lambda_max" else 1])
    module = Classifier(mlp(4, 6, 3), sgd)
    make_trainer(moments, misleads, follow, logger=capture).fit(module, batches())
    matrix = hessian(module, moments, STEP)
    values = torch.linalg.eigvalsh(matrix)
    ends = {"lambda_max": (values[-1], values[-2]), "lambda_min": (values[0], values[1])}[end]
    assert abs(float(ends[1] / ends[0]) - 1.0) > 0.05  # more than what counts as another eigenvalue
    row = rows(capture)[STEP]
    if density:
        check_eigenvalue(row, end, matrix, 0 if end == "lambda_max" else -1, TOLERANCE)
    else:  # the search ends on the second: nothing tells
        assert row[end] == pytest.approx(float(ends[1]), rel=1e-9)
