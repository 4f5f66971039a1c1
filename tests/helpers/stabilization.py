"""The stabilization monitor with everything it measures, quickly; a measurement that fails in a stage."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_curvature import StabilizationMonitor
from lightning_curvature.stabilization.options import ESTIMATORS
from lightning_curvature.stabilization.problem import StabilizationProblem
from tests.helpers import traps
from tests.helpers.counting import out_of_reach
from tests.helpers.modules import Plain
from tests.helpers.runs import classification
from tests.helpers.traps import Boom


def samples(count: int = 16, dtype: torch.dtype = torch.float64) -> DataLoader[Any]:
    """Single samples, in batches of eight."""
    return DataLoader(TensorDataset(*classification(1, count, dtype=dtype)[0]), batch_size=8, shuffle=True)


# All quantities by all estimators, as few of each as may be: what one leaves behind, the next would too.
QUICK: dict[str, Any] = {
    "sample_sizes": (2, 3),
    "subspace_dim": 1,
    "candidates": 2,
    "draws": 2,
    "trace_vectors": 3,
    "validation_draws": 1,
    "tolerance": 0.9,
    "estimators": ESTIMATORS,
    "every_n_train_steps": 4,
}


def monitor(**options: Any) -> StabilizationMonitor:
    return StabilizationMonitor(**(QUICK | options))


class Complex(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.phase = nn.Parameter(torch.ones(1, dtype=torch.complex128))


STAGES = ("direct, full space", "traces, full space", "subspace", "coefficients", "direct")


class Trap:
    """Where to fail, and calls until then; out of reach of the modules that fall into it."""

    stage: str | None = None
    calls: list[int]


trap = out_of_reach(Trap())
trap().calls = [0]


class Trapped(traps.Trapped):
    """Fails in all calls of one stage of the first measurement, with everything in disorder."""

    def __init__(self) -> None:
        super().__init__(trap().calls)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        try:
            return super().training_step(batch, batch_idx)
        except Boom:
            trap().calls[0] = 1  # the next one, too: a failure under ``torch.vmap`` is tried again without
            raise

    def on_train_batch_end(self, *args: Any) -> None:
        trap().stage = None


@contextlib.contextmanager
def failing_in(stage: str | None) -> Generator[None, None, None]:
    """Make each ``Trapped`` fail in a stage of the first measurement, or later in one that ``Trap`` is given."""
    timed = StabilizationProblem.timed

    @contextlib.contextmanager
    def noted(problem: StabilizationProblem, current: str) -> Generator[None, None, None]:
        with timed(problem, current):
            trap().calls[0] = int(current == trap().stage)
            yield

    trap().stage, trap().calls[0] = stage, 0
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(StabilizationProblem, "timed", noted)
            yield
    finally:
        trap().stage, trap().calls[0] = None, 0
