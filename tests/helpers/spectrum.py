"""What the tests of the spectrum monitor have in common."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_curvature import HessianSpectrumMonitor
from tests.oracles.hessian_spectrum import Part

# What the eigenvalues then owe to the eigensolver is as small as what rounding does to them.
TOLERANCE = 1e-12


SAMPLES, BATCH = 30, 8  # the last batch is ragged: 6


def samples(count: int = SAMPLES, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(4)
    return torch.randn(count, 4, generator=g, dtype=torch.float64).to(dtype), torch.randint(3, (count,), generator=g)


def monitor(*quantities: str, **options: Any) -> HessianSpectrumMonitor:
    defaults = {"every_n_train_steps": 2, "tolerance": TOLERANCE, "on_error": "raise"}
    return HessianSpectrumMonitor(quantities=quantities, **(defaults | options))  # type: ignore[arg-type]


def whole() -> list[Part]:
    return [Part(*samples())]
