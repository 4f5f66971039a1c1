"""λ_gen and update sharpness: of the updates that the optimizer would make now with each mini-batch's gradient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from lightning_curvature.batch_sharpness.options import OF_UPDATES
from tests.helpers.batch_sharpness import DRAWN, EXACT, Dense, Make, estimate, fit, learner, loader, monitor, sgd
from tests.oracles.hessian_spectrum import Curvature

OPTIMIZERS: dict[str, Make] = {
    "sgd": sgd,
    "momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.3, momentum=0.9, weight_decay=0.1),
    "momentum without decay": lambda m: torch.optim.SGD(m.parameters(), lr=0.3, momentum=0.9),
    "adam": lambda m: torch.optim.Adam(m.parameters(), lr=0.02),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=0.02, weight_decay=0.1),
}


@pytest.mark.parametrize("at_once", [1, 4])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_of_the_optimizers_own_updates(name: str, at_once: int) -> None:
    """From the state in which the optimizer is: at the second measurement, with two steps behind it."""
    quantities = (*OF_UPDATES, "gni", "batch_sharpness")
    options: dict[str, Any] = {"relative_error": 1e-9, "num_batches": 8, "batches_at_once": at_once}
    run = fit(monitor(*quantities, **options), learner(OPTIMIZERS[name]))
    assert (run.beside.follow._measurement.pairs_at_once or 1) == max(at_once // 2, 1)
    run.check(quantities=quantities)
    for step, row in run.rows.items():
        # At the first step momentum has nothing to add; weight decay has.
        is_sgd = name == "sgd" or (name == "momentum without decay" and step == 0)
        assert (row["update_sharpness"] == pytest.approx(row["batch_sharpness"], rel=EXACT)) is is_sgd
        if name == "sgd":
            # Of the same pairs: GNI but for the mean of gᵀg_B in place of ‖g‖².
            assert abs(row["lambda_gen"] / row["gni"] - 1.0) > 1e-6
        assert row["lambda_gen_batches"] == row["gni_batches"] == row["update_sharpness_batches"] == 8.0


@pytest.mark.parametrize("at_once", [1, 4])
def test_batches_that_momentum_climbs_count_against(at_once: int) -> None:
    """A batch whose loss the step raises takes from the mean descent; its ratio, of any size, is not averaged."""
    make = lambda m: torch.optim.SGD(m.parameters(), lr=0.5, momentum=0.95)  # noqa: E731
    options: dict[str, Any] = {"batch_size": 1, "relative_error": 1e-9, "batches_at_once": at_once}
    run = fit(monitor("update_sharpness", **options), learner(make), loader(1))
    climbed = 0
    for step, row in run.rows.items():
        dense = Dense(Curvature(run.module.network, run.module.loss, run.moment(step)))
        batches = run.beside.draws(step, 24)
        gradients = [dense.of(batch)[0] for batch in batches]
        updates = run.beside.updates(step, gradients, lambda p: p.requires_grad)
        climbed += sum(float(g @ v) < 0.0 for g, v in zip(gradients, updates, strict=True))
        value, _ = estimate(dense.terms("update_sharpness", batches, updates))
        assert row["update_sharpness"] == pytest.approx(value, rel=EXACT)
    assert climbed > 0


def test_with_clipped_gradients() -> None:
    """The update is that of the clipped gradient, the descent along it that of the gradient as it is."""
    bound = 0.05
    run = fit(monitor(*OF_UPDATES, relative_error=1e-9, num_batches=8), gradient_clip_val=bound)
    for step, row in run.rows.items():
        dense = Dense(Curvature(run.module.network, run.module.loss, run.moment(step)))
        batches = run.beside.draws(step, int(row["lambda_gen_batches"]))
        gradients = [dense.of(batch)[0] for batch in batches]
        assert all(float(g.norm()) > bound for g in gradients)
        # torch's clip_grad_norm_ divides by the norm + 1e-6.
        clipped = [g * (bound / (g.norm() + 1e-6)) for g in gradients]
        for name in OF_UPDATES:
            value, error = estimate(dense.terms(name, batches, clipped))
            assert row[name] == pytest.approx(value, rel=EXACT)
            assert row[f"{name}_stderr"] == pytest.approx(error, rel=100 * EXACT)


def test_ascending_updates_have_neither() -> None:
    make = lambda m: torch.optim.SGD(m.parameters(), lr=0.3, maximize=True)  # noqa: E731
    for row in fit(monitor(*OF_UPDATES, "ias"), learner(make)).rows.values():
        for name in OF_UPDATES:
            assert math.isnan(row[name])
            assert math.isnan(row[f"{name}_stderr"])
        assert math.isfinite(row["ias"])


def test_no_learning_rate_no_update() -> None:
    """A warm-up begins at 0, where there is no update over η; everything else is measured."""

    def warmed(module: nn.Module) -> Any:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.3)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: t / 4)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    first, later = fit(monitor(num_batches=8), learner(warmed)).rows.values()
    for name in DRAWN:
        assert math.isnan(first[name]) == math.isnan(first[f"{name}_stderr"]) == (name in OF_UPDATES)
        assert math.isfinite(later[name])
    assert first["lambda_gen_batches"] == first["update_sharpness_batches"] == 0.0
    assert (first["two_over_lr"], later["two_over_lr"]) == (math.inf, pytest.approx(2.0 / 0.15))
