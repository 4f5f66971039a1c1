"""The same products by curvlinops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_curvature.operators import GaussNewtonOperator, HessianOperator
from tests.helpers.operators import Data, matrix, off

curvlinops = pytest.importorskip("curvlinops")

# Both sum some hundred numbers in float64, in other orders; units of the largest entry (see test_exact.py).
EXACT = 200 * torch.finfo(torch.float64).eps


def convolution() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 2), nn.Sigmoid(), nn.Flatten(), nn.Linear(8, 3))


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(9, 3), nn.Tanh(), nn.Linear(3, 3))


def data_of(network: nn.Module, loss: nn.Module) -> Data:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(10, 9, generator=g, dtype=torch.float64)
    x = x.reshape(10, 1, 3, 3) if isinstance(network[0], nn.Conv2d) else x  # type: ignore[index]
    y = torch.randint(3, (10,), generator=g)
    if isinstance(loss, nn.MSELoss):
        y = torch.randn(10, 3, generator=g, dtype=torch.float64)
    return list(zip(x.split((8, 2)), y.split((8, 2)), strict=True))


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.MSELoss()], ids=["cross-entropy", "squared error"])
@pytest.mark.parametrize("make", [convolution, perceptron])
@pytest.mark.parametrize(
    ("kind", "other"), [(HessianOperator, "HessianLinearOperator"), (GaussNewtonOperator, "GGNLinearOperator")]
)
def test_every_column_by_another_tool(kind: Any, other: str, make: Any, loss: nn.Module) -> None:
    torch.manual_seed(0)
    network = make().double()
    data = data_of(network, loss)
    theirs = getattr(curvlinops, other)(network, loss, list(network.parameters()), data)
    ours = matrix(kind.of(network, loss, data))
    assert off(ours, theirs @ torch.eye(len(ours), dtype=torch.float64)) < EXACT
