"""Over many draws: the expectations over all mini-batches, within the errors that are stated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from tests.helpers.batch_sharpness import DRAWN, Make, fit, monitor, sgd
from tests.helpers.runs import Classifier, mlp
from tests.oracles.mini_batches import MiniBatches

# Of a normal distribution one value in 16,000 lies further out than four standard errors; the seeds are fixed.
DEVIATIONS = 4.0
SAMPLES, SIZE = 6, 3
COUNT = 120


def few() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(8)
    return torch.randn(SAMPLES, 2, generator=g, dtype=torch.float64), torch.randint(2, (SAMPLES,), generator=g)


def adam(module: Any) -> torch.optim.Optimizer:
    """As after a step: in its first one it would move all parameters alike."""
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    for p in module.parameters():
        p.grad = torch.ones_like(p) + p
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize(
    ("make", "replacement", "kind"), [(sgd, False, "hessian"), (adam, False, "gauss_newton"), (sgd, True, "hessian")]
)
@pytest.mark.slow
def test_values_are_the_expectations(make: Make, replacement: bool, kind: Any) -> None:
    data = TensorDataset(*few())
    sampler = RandomSampler(data, replacement=replacement)
    module = Classifier(mlp(2, 2, 2), make)
    follow = monitor(curvature=kind, num_batches=COUNT, min_batches=COUNT, relative_error=1e-9, tolerance=0.01)
    run = fit(follow, module, DataLoader(data, batch_size=SIZE, sampler=sampler), max_steps=1)
    (row,) = run.rows.values()
    network, _ = run.beside.copies[0]
    exact = MiniBatches(network, F.cross_entropy, *few(), SIZE, replacement, kind)
    gradients = list(exact.gradients)
    updates = gradients if make is sgd else run.beside.updates(0, gradients, lambda p: p.requires_grad)
    expected = {
        "batch_sharpness": exact.batch_sharpness(),
        "modified_batch_sharpness": exact.modified_batch_sharpness(),
        "ias": exact.ias(),
        "gni": exact.gni(),
        "lambda_gen": exact.lambda_gen(updates),
        "update_sharpness": exact.update_sharpness(updates),
        "lambda_max_b": exact.lambda_max(),
    }
    if make is sgd:
        # Over all mini-batches enumerated: sums in another order.
        assert expected["lambda_gen"] == pytest.approx(expected["gni"], rel=1e-12)
    for name in DRAWN:
        value, error = row[name], row[f"{name}_stderr"]
        assert row[f"{name}_batches"] == COUNT
        assert 0.0 < error < 0.15 * abs(value), name
        # The residual leaves 1e-4 of an eigenvalue.
        assert abs(value - expected[name]) <= DEVIATIONS * error + 1e-4 * value, name
    # Nor would one of them have passed for the other, in the mean.
    assert row["ias"] + DEVIATIONS * row["ias_stderr"] < row["gni"]
