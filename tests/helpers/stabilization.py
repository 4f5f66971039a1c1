"""The stabilization monitor with everything it measures, quickly; a measurement that fails in a stage."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_curvature import StabilizationMonitor
from lightning_curvature.stabilization.options import ESTIMATORS
from tests.helpers import traps
from tests.helpers.runs import classification
from tests.helpers.traps import Boom


def samples(count: int = 16, dtype: torch.dtype = torch.float64) -> DataLoader[Any]:
    """Single samples, in batches of eight."""
    return DataLoader(TensorDataset(*classification(1, count, dtype=dtype)[0]), batch_size=8, shuffle=True)


def monitor(**options: Any) -> StabilizationMonitor:
    """All quantities by all estimators, as few of each as may be: what one leaves behind, the next would too."""
    quick: dict[str, Any] = {
        "sample_sizes": (2, 3),
        "subspace_dim": 1,
        "candidates": 2,
        "draws": 2,
        "trace_vectors": 3,
        "tolerance": 0.1,
        "estimators": ESTIMATORS,
        "every_n_train_steps": 4,
    }
    return StabilizationMonitor(**(quick | options))


class Trapped(traps.Trapped):
    """Fails in all calls of one stage of the first measurement, with everything in disorder."""

    def __init__(self) -> None:
        super().__init__([0])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        try:
            return super().training_step(batch, batch_idx)
        except Boom:
            self.trap()[0] = 1  # the next one, too: a failure under ``torch.vmap`` is tried again without
            raise

    def on_train_batch_end(self, *args: Any) -> None:
        Trap.stage = None


class Trap:
    """Where to fail."""

    stage: str | None = None
