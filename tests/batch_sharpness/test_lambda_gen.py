"""λ_gen: of the updates that the optimizer would make from its present state with each mini-batch's gradient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.batch_sharpness import DRAWN, EXACT, Dense, Make, estimate, fit, learner, monitor, sgd
from tests.oracles.hessian_spectrum import Curvature

OPTIMIZERS: dict[str, Make] = {
    "sgd": sgd,
    "momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.3, momentum=0.9, weight_decay=0.1),
    "adam": lambda m: torch.optim.Adam(m.parameters(), lr=0.02),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=0.02, weight_decay=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_lambda_gen_of_the_optimizers_own_updates(name: str) -> None:
    """From the state in which the optimizer is: at the second measurement, with two steps behind it."""
    run = fit(monitor("lambda_gen", "gni", relative_error=1e-9, num_batches=8), learner(OPTIMIZERS[name]))
    run.check()
    for row in run.rows.values():
        if name == "sgd":
            # Of the same pairs: GNI but for the mean of gᵀg_B in place of ‖g‖².
            assert abs(row["lambda_gen"] / row["gni"] - 1.0) > 1e-6
        assert row["lambda_gen_batches"] == row["gni_batches"] == 8.0


def test_lambda_gen_with_clipped_gradients() -> None:
    """The update is that of the clipped gradient, the descent along it that of the gradient as it is."""
    bound = 0.05
    run = fit(monitor("lambda_gen"), gradient_clip_val=bound)
    for step, row in run.rows.items():
        dense = Dense(Curvature(run.module.network, run.module.loss, run.moment(step)))
        batches = run.beside.draws(step, int(row["lambda_gen_batches"]))
        gradients = [dense.of(batch)[0] for batch in batches]
        assert all(float(g.norm()) > bound for g in gradients)
        # torch's clip_grad_norm_ divides by the norm + 1e-6.
        clipped = [g * (bound / (g.norm() + 1e-6)) for g in gradients]
        value, error = estimate(dense.terms("lambda_gen", batches, clipped))
        assert row["lambda_gen"] == pytest.approx(value, rel=EXACT)
        assert row["lambda_gen_stderr"] == pytest.approx(error, rel=100 * EXACT)


def test_ascending_updates_have_no_lambda_gen() -> None:
    make = lambda m: torch.optim.SGD(m.parameters(), lr=0.3, maximize=True)  # noqa: E731
    for row in fit(monitor("lambda_gen", "ias"), learner(make)).rows.values():
        assert math.isnan(row["lambda_gen"])
        assert math.isnan(row["lambda_gen_stderr"])
        assert math.isfinite(row["ias"])


def test_no_learning_rate_no_lambda_gen() -> None:
    """A warm-up begins at 0, where there is no update over η; everything else is measured."""

    def warmed(module: nn.Module) -> Any:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.3)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: t / 4)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    first, later = fit(monitor(num_batches=8), learner(warmed)).rows.values()
    for name in DRAWN:
        assert math.isnan(first[name]) == math.isnan(first[f"{name}_stderr"]) == (name == "lambda_gen")
        assert math.isfinite(later[name])
    assert first["lambda_gen_batches"] == 0.0
    assert (first["two_over_lr"], later["two_over_lr"]) == (math.inf, pytest.approx(2.0 / 0.15))
