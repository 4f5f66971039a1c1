"""A run watched by StabilizationMonitor that one process, or two together, make of the same data, and its tables."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import pytest
import torch.distributed as dist
from torch.utils.data import IterableDataset

from lightning_curvature import StabilizationMonitor
from lightning_curvature.stabilization.options import ESTIMATORS
from lightning_curvature.stabilization.problem import StabilizationProblem
from lightning_curvature.stabilization.result import SampleGrowth
from tests.distributed.occasional_cases import OccasionalCase, Outcome
from tests.distributed.spectrum_cases import dataset

# The stage that a measurement of this process is in. It belongs to a thread, so that no measurement puts it back.
Stage: Any = threading.local()
Stage.now = None


_timed = StabilizationProblem.timed


@contextlib.contextmanager
def _noted(problem: StabilizationProblem, stage: str) -> Generator[None, None, None]:
    Stage.now = stage
    try:
        with _timed(problem, stage):
            yield
    finally:
        Stage.now = None


class Stream(IterableDataset[Any]):
    """Shares itself out: rows in turn."""

    def __iter__(self) -> Iterator[Any]:
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        data: Any = dataset()
        return (data[index] for index in range(rank, len(data), ranks))


class StabilizationCase(OccasionalCase):
    """A run that StabilizationMonitor watches."""

    def kind(self) -> type[StabilizationMonitor]:
        return StabilizationMonitor

    def own_options(self) -> dict[str, Any]:
        """Tolerances that leave nothing of the search to be seen."""
        return {
            # One sample has no second rank, and a step begins with as many as are left to it.
            "sample_sizes": (1, 2, 5),
            "candidates": 3,
            "subspace_dim": (1, 2),
            "sigma": (1e-3, 0.1),
            "estimators": ESTIMATORS,
            "draws": 3,
            "trace_vectors": 3,
            "tolerance": 1e-9,
            "micro_batch_size": 2,
        }

    @contextlib.contextmanager
    def running(self) -> Generator[None, None, None]:
        """Stages are noted."""
        StabilizationProblem.timed = _noted  # type: ignore[method-assign]
        try:
            yield
        finally:
            StabilizationProblem.timed = _timed  # type: ignore[method-assign]


def assert_same_table(found: SampleGrowth | None, expected: SampleGrowth | None, tolerance: float) -> None:
    """Every number of every row is that of one process."""
    assert found is not None
    assert expected is not None
    assert len(found.rows) == len(expected.rows) > 0
    for row, other in zip(found.rows, expected.rows, strict=True):
        for name, value in asdict(other).items():
            if name == "model_error":
                # A difference of nearly equal numbers, of which 1e-10 is left to be seen at the smaller σ.
                assert row.model_error == pytest.approx(value, rel=1e-6, abs=1e-9, nan_ok=True)
            elif isinstance(value, float):
                # An error may be nothing beside what it is the error of.
                size = max(abs(value), abs(other.value))
                assert getattr(row, name) == pytest.approx(value, rel=0.0, abs=tolerance * size, nan_ok=True), (
                    name,
                    row,
                )
            else:
                assert getattr(row, name) == value, row


def assert_same_growth(together: Sequence[Outcome], alone: Outcome, tolerance: float) -> None:
    """All tables, and what is logged of them."""
    for outcome in together:
        assert outcome.rows.keys() == alone.rows.keys()
        assert len(outcome.results) == len(alone.results)
        for found, expected in zip(outcome.results, alone.results, strict=True):
            assert_same_table(found, expected, tolerance)
        for step, row in alone.rows.items():
            assert outcome.rows[step].keys() == row.keys()


def same_text(first: Outcome, second: Outcome) -> bool:
    """Whether both wrote the same to the last bit; as text, in which a NaN equals a NaN."""
    tables = ([growth.rows if growth else None for growth in one.results] for one in (first, second))
    return repr(first.rows) == repr(second.rows) and repr(next(tables)) == repr(next(tables))
