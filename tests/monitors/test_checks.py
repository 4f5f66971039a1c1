"""What stands beside quantized modules in their packages, and is none, is let through."""

import pytest
import torch
from torch import nn

from lightning_curvature.monitors.checks import check_not_quantized
from tests.helpers.modules import stand_in

OTHERS = (
    "bitsandbytes.nn.modules.Embedding",
    "bitsandbytes.nn.modules.StableEmbedding",
    "torchao.sparsity.supermask.SupermaskLinear",
    "torchao_of_mine.float8.Linear",
)


@pytest.mark.parametrize("name", OTHERS)
def test_not_quantized(name: str) -> None:
    """Stand-ins, as there."""
    check_not_quantized("Monitor", nn.Sequential(stand_in(name, nn.Linear)(2, 2)))


def test_float_functional() -> None:
    check_not_quantized("Monitor", nn.Sequential(torch.ao.nn.quantized.FloatFunctional()))
