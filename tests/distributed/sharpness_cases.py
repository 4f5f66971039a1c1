"""A run watched by BatchSharpnessMonitor that one process, or two together, make of the same data, and its numbers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import lightning.pytorch as pl
import pytest
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_curvature import BatchSharpnessMonitor, CurvatureWarning
from lightning_curvature.batch_sharpness.options import QUANTITIES
from tests.distributed.cases import collectives, state_of
from tests.distributed.spectrum_cases import STEP, Measuring, dataset
from tests.helpers.runs import Capture, make_trainer, rows

# Steps made: the data of an epoch that two processes share differs from that of one in its last, ragged step alone.
STEPS = 2


@dataclass
class Outcome:
    """What a process has after a run; lists are by batch.

    Attributes:
        rows: what the monitor wrote, by step, keys without prefix.
        collectives: collectives that the monitor took part in.
        intact: whether the state after the monitor's hook was that before it.
        said: warnings of the package.
        state: parameters, buffers, optimizer state and random numbers at the end.
    """

    rows: dict[int, dict[str, float]] = field(default_factory=dict)
    collectives: list[int] = field(default_factory=list)
    intact: list[bool] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    state: dict[str, Tensor] = field(default_factory=dict)


class Observed(BatchSharpnessMonitor):
    """The monitor, and what can be seen from around its measurements."""

    def __init__(self, outcome: Outcome, **options: Any) -> None:
        super().__init__(**options)
        self.outcome = outcome

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        before, state = collectives(), state_of(pl_module, trainer)
        Measuring.step, Measuring.calls = trainer.global_step, 0
        try:
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        finally:
            Measuring.step = None
        self.outcome.collectives.append(collectives() - before)
        after = state_of(pl_module, trainer)
        self.outcome.intact.append(state.keys() == after.keys() and all(state[k].equal(v) for k, v in after.items()))


@dataclass
class SharpnessCase:
    """A run, ready to be made by one process or two.

    Attributes:
        module: makes the module.
        data: makes the dataset.
        batches: whether the loader hands out whole batches, of each rank its own.
        step: samples of a batch, over all ranks.
        monitor: options of the monitor.
        trainer: options of the Trainer.
        alone: options of the monitor of one process, where they differ.
        steps: optimizer steps.
        strategy: of several processes.
        collate: makes batches of samples; default: as torch does.
        watched: whether there is a monitor at all.
    """

    module: Callable[[], pl.LightningModule]
    data: Callable[[], Dataset[Any]] = dataset
    batches: bool = False
    step: int = STEP
    monitor: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    alone: dict[str, Any] = field(default_factory=dict)
    steps: int = STEPS
    strategy: Callable[[], Any] | str = "ddp"
    collate: Callable[[list[Any]], Any] | None = None
    watched: bool = True

    def unwatched(self) -> SharpnessCase:
        """The same run without the monitor."""
        return replace(self, watched=False)

    def __call__(self, rank: int = 0, world_size: int = 1) -> Outcome:
        outcome, capture, module = Outcome(), Capture(), self.module()
        options: dict[str, Any] = {
            "quantities": QUANTITIES,
            "every_n_train_steps": 1,
            "num_batches": 40,
            "min_batches": 4,
            "relative_error": 0.15,
            "tolerance": 1e-12,  # searches begin with other vectors on each rank
        }
        own = {} if world_size > 1 else self.alone
        monitors = [Observed(outcome, **(options | self.monitor | own))] if self.watched else []
        strategy = self.strategy() if callable(self.strategy) else self.strategy
        parallel = {"strategy": strategy, "devices": world_size} if world_size > 1 else {}
        limits = {"max_steps": self.steps, "max_epochs": 9}
        trainer = make_trainer(*monitors, logger=capture, **(limits | parallel | self.trainer))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            trainer.fit(module, self._loader(rank, world_size))
        outcome.said = [str(w.message) for w in caught if issubclass(w.category, CurvatureWarning)]
        outcome.rows |= rows(capture)
        outcome.state = state_of(module, trainer)
        assert trainer.global_step == self.steps
        return outcome

    def _loader(self, rank: int, world_size: int) -> DataLoader[Any]:
        data: Any = self.data()
        if self.batches:
            own = [data[i + rank : i + self.step : world_size] for i in range(0, len(data), self.step)]
            return DataLoader(own, batch_size=None, shuffle=False)  # type: ignore[arg-type]
        # Rows in turn: the batches of both make that of one process. Lightning's own would shuffle.
        sampler = DistributedSampler(data, world_size, rank, shuffle=False) if world_size > 1 else None
        return DataLoader(data, batch_size=self.step // world_size, sampler=sampler, collate_fn=self.collate)


def assert_same_sharpness(together: Sequence[Outcome], alone: Outcome, tolerance: float) -> None:
    """Every number of every step is that of one process, also how many batches it took."""
    for outcome in together:
        assert outcome.rows.keys() == alone.rows.keys()
        for step, expected in alone.rows.items():
            row = outcome.rows[step]
            assert row.keys() == expected.keys()
            for key, value in expected.items():
                # A standard error is what is left of a difference of values; that of a module is the root of one.
                size = 0.0 if key.endswith("_batches") else abs(expected[key.removesuffix("_stderr")])
                size = 1e4 * abs(expected["batch_sharpness"]) if "_stderr/" in key else size
                assert row[key] == pytest.approx(value, rel=0.0, abs=tolerance * size, nan_ok=True), (step, key)


def lost(row: dict[str, float]) -> set[str]:
    """Keys of what is not there."""
    return {key for key, value in row.items() if math.isnan(value)}


def assert_complete(outcome: Outcome) -> None:
    """Every number is one, but the standard error of a single draw."""
    assert len(outcome.rows) >= 1
    for row in outcome.rows.values():
        assert lost(row) <= {"step_sharpness_stderr"}


def same_text(first: Outcome, second: Outcome) -> bool:
    """Whether both wrote the same to the last bit; as text, in which a NaN equals a NaN."""
    return repr(first.rows) == repr(second.rows)
