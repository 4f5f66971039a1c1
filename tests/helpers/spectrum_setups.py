"""Runs in which the spectrum is compared with dense matrices of the samples that the network met."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_curvature import HessianSpectrumMonitor
from tests.helpers.counting import on_forward
from tests.helpers.runs import Capture, Classifier, make_trainer, mlp, rows
from tests.helpers.spectrum import BATCH, TOLERANCE, samples, whole
from tests.oracles.hessian_spectrum import Curvature, Moment, Moments, Part, check_eigenvalue


def sgd(module: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.3, momentum=0.5)


def module(make: Any = sgd) -> Classifier:
    return Classifier(mlp(4, 6, 3), make)


QUANTITIES = ("lambda_max", "lambda_min", "gauss_newton_lambda_max")


class Seen(pl.Callback):
    """Notes the inputs that the network meets in each measurement, with torch's random state. Two stand around it."""

    def __init__(self, other: Seen | None = None) -> None:
        self.parts: list[list[tuple[Tensor, Tensor]]] = []
        self.others, self._on = other, False

    def watch(self, network: nn.Module) -> None:
        on_forward(network, self._note, before=True)

    def _note(self, module: nn.Module, args: Any) -> None:
        if self._on:
            self.parts[-1].append((args[0].detach().clone(), torch.get_rng_state()))

    def on_train_batch_start(self, *args: Any) -> None:
        if self.others is not None:
            self.others._on = False
        else:
            self._on = True
            self.parts.append([])

    def measured(self) -> list[list[tuple[Tensor, Tensor]]]:
        return [parts for parts in self.parts if parts]


def fit(
    module: Any, data: Any, *monitors: HessianSpectrumMonitor, index: int = 0, **options: Any
) -> tuple[Capture, list[Moment], Seen]:
    """Fit with eyes around the monitors that leave no trace in the run."""
    capture, moments, seen = Capture(), Moments(index), Seen()
    seen.watch(module.network)
    trainer = make_trainer(moments, seen, *monitors, Seen(seen), logger=capture, **options)
    trainer.fit(module, data)
    return capture, moments.all, seen


def loader(x: Tensor | None = None, y: Tensor | None = None, **options: Any) -> DataLoader[Any]:
    if x is None or y is None:
        x, y = samples()
    return DataLoader(TensorDataset(x, y), **({"batch_size": BATCH, "shuffle": True} | options))


def check(
    module: Any,
    capture: Capture,
    moments: list[Moment] | dict[int, Moment],
    parts: list[Part] | None = None,
    quantities: tuple[str, ...] = QUANTITIES,
    least: int = 2,
    **options: Any,
) -> None:
    """Compare every row with the matrices of the parts, by default of all samples."""
    found = rows(capture)
    assert len(found) >= least
    for step, row in found.items():
        curvature = Curvature(module.network, module.loss, moments[step], **options)
        hessian = curvature.hessian(parts or whole())
        for key, place in (("lambda_max", 0), ("lambda_min", -1)):
            if key in quantities:
                check_eigenvalue(row, key, hessian, place, TOLERANCE)
        if "gauss_newton_lambda_max" in quantities:
            matrix = curvature.gauss_newton(parts or whole())
            check_eigenvalue(row, "gauss_newton_lambda_max", matrix, 0, TOLERANCE)


def same_rows(part: Tensor, x: Tensor) -> list[int]:
    """Numbers of the rows of x that the part holds."""
    return [int((x == row).all(dim=1).nonzero()) for row in part]
