"""A run watched by StabilizationMonitor that one process, or two together, make of the same data, and its tables."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from lightning_curvature import CurvatureWarning, StabilizationMonitor
from lightning_curvature.sample_growth import SampleGrowth
from lightning_curvature.stabilization_problem import ESTIMATORS
from lightning_curvature.stabilization_tools import GrowthTools
from tests.distributed.cases import collectives, state_of
from tests.distributed.spectrum_cases import STEP, Measuring, dataset
from tests.runs import Capture, make_trainer

# Steps made: the data of an epoch that two processes share differs from that of one in its last, ragged step alone.
STEPS = 2


class Stage:
    """What is being measured in this process."""

    now: str | None = None


_timed = GrowthTools.timed


@contextlib.contextmanager
def _noted(tools: GrowthTools, stage: str) -> Generator[None, None, None]:
    Stage.now = stage
    try:
        with _timed(tools, stage):
            yield
    finally:
        Stage.now = None


@dataclass
class Outcome:
    """What a process has after a run; lists are by measurement, the last of them after the last step.

    Attributes:
        rows: what the monitor wrote, by step, keys without prefix.
        growth: tables.
        collectives: collectives that the monitor took part in.
        intact: whether the state after the monitor's hook was that before it.
        said: warnings of the package.
        state: parameters, buffers, optimizer state and random numbers at the end.
    """

    rows: dict[int, dict[str, float]] = field(default_factory=dict)
    growth: list[SampleGrowth | None] = field(default_factory=list)
    collectives: list[int] = field(default_factory=list)
    intact: list[bool] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    state: dict[str, Tensor] = field(default_factory=dict)


class Observed(StabilizationMonitor):
    """The monitor, and what can be seen from around its measurements."""

    def __init__(self, outcome: Outcome, **options: Any) -> None:
        super().__init__(**options)
        self.outcome = outcome

    def _measure_now(self, trainer: Any, pl_module: Any, batch: Any) -> None:
        before, state, self.result = collectives(), state_of(pl_module, trainer), None
        Measuring.step = trainer.global_step
        try:
            super()._measure_now(trainer, pl_module, batch)
        finally:
            Measuring.step = None
        self.outcome.collectives.append(collectives() - before)
        self.outcome.growth.append(self.result)
        after = state_of(pl_module, trainer)
        self.outcome.intact.append(state.keys() == after.keys() and all(state[k].equal(v) for k, v in after.items()))


class Stream(IterableDataset[Any]):
    """Shares itself out: rows in turn."""

    def __iter__(self) -> Iterator[Any]:
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        data: Any = dataset()
        return (data[index] for index in range(rank, len(data), ranks))


@dataclass
class StabilizationCase:
    """A run, ready to be made by one process or two.

    Attributes:
        module: makes the module.
        data: makes the dataset.
        step: samples of a batch, over all ranks.
        monitor: options of the monitor.
        trainer: options of the Trainer.
        steps: optimizer steps.
        strategy: of several processes.
        watched: whether there is a monitor at all.
    """

    module: Callable[[], pl.LightningModule]
    data: Callable[[], Dataset[Any]] = dataset
    step: int = STEP
    monitor: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    steps: int = STEPS
    strategy: str = "ddp"
    watched: bool = True

    def unwatched(self) -> StabilizationCase:
        """The same run without the monitor."""
        return replace(self, watched=False)

    def options(self) -> dict[str, Any]:
        """Of the monitor; tolerances that leave nothing of the search to be seen."""
        own: dict[str, Any] = {
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
        return own | self.monitor

    def __call__(self, rank: int = 0, world_size: int = 1) -> Outcome:
        outcome, capture, module = Outcome(), Capture(), self.module()
        monitors = [Observed(outcome, **self.options())] if self.watched else []
        trainer = self.make_trainer(world_size, *monitors, logger=capture)
        GrowthTools.timed = _noted  # type: ignore[method-assign]
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("default")
                trainer.fit(module, self.loader(rank, world_size))
        finally:
            GrowthTools.timed = _timed  # type: ignore[method-assign]
        outcome.said = [str(w.message) for w in caught if issubclass(w.category, CurvatureWarning)]
        cut = len("curvature/")
        for step, row in sorted(capture.rows.items()):
            if found := {key[cut:]: v for key, v in row.items() if key.startswith("curvature/")}:
                outcome.rows[step] = found
        outcome.state = state_of(module, trainer)
        assert trainer.global_step == self.steps
        return outcome

    def make_trainer(self, world_size: int, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
        """For one process or several."""
        parallel = {"strategy": self.strategy, "devices": world_size} if world_size > 1 else {}
        limits = {"max_steps": self.steps, "max_epochs": 9}
        return make_trainer(*callbacks, **(limits | parallel | options | self.trainer))

    def loader(self, rank: int, world_size: int) -> DataLoader[Any]:
        """Rows in turn: the batches of both make that of one process. Lightning's own would shuffle."""
        data: Any = self.data()
        shared = world_size > 1 and not isinstance(data, IterableDataset)
        sampler = DistributedSampler(data, world_size, rank, shuffle=False) if shared else None
        return DataLoader(data, batch_size=self.step // world_size, sampler=sampler)


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
        assert len(outcome.growth) == len(alone.growth)
        for found, expected in zip(outcome.growth, alone.growth, strict=True):
            assert_same_table(found, expected, tolerance)
        for step, row in alone.rows.items():
            assert outcome.rows[step].keys() == row.keys()


def same_text(first: Outcome, second: Outcome) -> bool:
    """Whether both wrote the same to the last bit; as text, in which a NaN equals a NaN."""
    tables = ([growth.rows if growth else None for growth in one.growth] for one in (first, second))
    return repr(first.rows) == repr(second.rows) and repr(next(tables)) == repr(next(tables))
