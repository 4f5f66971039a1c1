"""Runs, by one process or two, that an occasional monitor watches, and the outcome of each process."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import lightning.pytorch as pl
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from lightning_curvature import CurvatureWarning
from tests.distributed.cases import collectives, state_of
from tests.distributed.spectrum_cases import STEP, Measuring, dataset
from tests.helpers.runs import Capture, make_trainer, rows

# Steps made: the data of an epoch that two processes share differs from that of one in its last, ragged step alone.
STEPS = 2


@dataclass
class Outcome:
    """Outcome of a run in one process; lists are by measurement, the last of them after the last step.

    Attributes:
        rows: what the monitor wrote, by step, keys without prefix.
        results: the monitor's results.
        collectives: those that the monitor took part in.
        intact: whether the state after the monitor's hook was that before it.
        said: warnings of the package.
        state: parameters, buffers, optimizer state and random numbers at the end.
    """

    rows: dict[int, dict[str, float]] = field(default_factory=dict)
    results: list[Any] = field(default_factory=list)
    collectives: list[int] = field(default_factory=list)
    intact: list[bool] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    state: dict[str, Tensor] = field(default_factory=dict)


def observed(kind: type[Any]) -> type[Any]:
    """Return a subclass of a monitor that notes collectives, results and state around its measurements."""

    class Observed(kind):  # type: ignore[misc]
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
            self.outcome.results.append(self.result)
            after = state_of(pl_module, trainer)
            intact = state.keys() == after.keys() and all(state[k].equal(v) for k, v in after.items())
            self.outcome.intact.append(intact)

    return Observed


Own = TypeVar("Own", bound="OccasionalCase")


@dataclass
class OccasionalCase:
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

    def kind(self) -> type[Any]:
        """Class of the monitor."""
        raise NotImplementedError

    def own_options(self) -> dict[str, Any]:
        """Options of the monitor where a case says nothing else."""
        raise NotImplementedError

    def running(self) -> contextlib.AbstractContextManager[Any]:
        """Stands around the fit."""
        return contextlib.nullcontext()

    def unwatched(self: Own) -> Own:
        """The same run without the monitor."""
        return replace(self, watched=False)

    def options(self) -> dict[str, Any]:
        """Of the monitor."""
        return self.own_options() | self.monitor

    def __call__(self, rank: int = 0, world_size: int = 1) -> Outcome:
        outcome, capture, module = Outcome(), Capture(), self.module()
        monitors = [observed(self.kind())(outcome, **self.options())] if self.watched else []
        trainer = self.make_trainer(world_size, *monitors, logger=capture)
        with self.running(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.fit(module, self.loader(rank, world_size))
        outcome.said = [str(w.message) for w in caught if issubclass(w.category, CurvatureWarning)]
        outcome.rows |= rows(capture)
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
