"""A run watched by NoiseCovarianceMonitor that one process, or two together, make of the same data, and its numbers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from lightning_curvature import CurvatureWarning, NoiseCovarianceMonitor
from lightning_curvature.noise_curvature import NoiseCurvature
from lightning_curvature.noise_problem import QUANTITIES
from tests.distributed.cases import collectives, state_of
from tests.distributed.spectrum_cases import STEP, Measuring, dataset
from tests.runs import Capture, make_trainer

STEPS = 2


@dataclass
class Outcome:
    """What a process has after a run; lists are by measurement.

    Attributes:
        rows: what the monitor wrote, by step, keys without prefix.
        results: what was found.
        collectives: those that the monitor took part in.
        intact: whether the state after the monitor's hook was that before it.
        said: warnings of the package.
        state: parameters, buffers, optimizer state and random numbers at the end.
    """

    rows: dict[int, dict[str, float]] = field(default_factory=dict)
    results: list[NoiseCurvature | None] = field(default_factory=list)
    collectives: list[int] = field(default_factory=list)
    intact: list[bool] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    state: dict[str, Tensor] = field(default_factory=dict)


class Observed(NoiseCovarianceMonitor):
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
        self.outcome.results.append(self.result)
        after = state_of(pl_module, trainer)
        self.outcome.intact.append(state.keys() == after.keys() and all(state[k].equal(v) for k, v in after.items()))


@dataclass
class NoiseCase:
    """A run, ready to be made by one process or two.

    Attributes:
        module: makes the module.
        monitor: options of the monitor.
        data: makes the dataset.
        step: samples of a batch, over all ranks.
        trainer: options of the Trainer.
        steps: optimizer steps.
        watched: whether there is a monitor at all.
    """

    module: Callable[[], pl.LightningModule]
    monitor: dict[str, Any] = field(default_factory=dict)
    data: Callable[[], Dataset[Any]] = dataset
    step: int = STEP
    trainer: dict[str, Any] = field(default_factory=dict)
    steps: int = STEPS
    watched: bool = True

    def unwatched(self) -> NoiseCase:
        """The same run without the monitor."""
        return replace(self, watched=False)

    def options(self) -> dict[str, Any]:
        """Of the monitor: all quantities, of micro-batches that are the same on any number of ranks."""
        own: dict[str, Any] = {
            "parameter": "network.0.weight",
            "quantities": QUANTITIES,
            "every_n_train_steps": 1,
            "micro_batch_size": 6,
            "haar_draws": 2,
        }
        return own | self.monitor

    def __call__(self, rank: int = 0, world_size: int = 1) -> Outcome:
        outcome, capture, module = Outcome(), Capture(), self.module()
        monitors = [Observed(outcome, **self.options())] if self.watched else []
        trainer = self.make_trainer(world_size, *monitors, logger=capture)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.fit(module, self.loader(rank, world_size))
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
        parallel = {"strategy": "ddp", "devices": world_size} if world_size > 1 else {}
        limits = {"max_steps": self.steps, "max_epochs": 9}
        return make_trainer(*callbacks, **(limits | parallel | options | self.trainer))

    def loader(self, rank: int, world_size: int) -> DataLoader[Any]:
        """Rows in turn: the batches of both make that of one process. Lightning's own would shuffle."""
        data: Any = self.data()
        shared = world_size > 1 and not isinstance(data, IterableDataset)
        sampler = DistributedSampler(data, world_size, rank, shuffle=False) if shared else None
        return DataLoader(data, batch_size=self.step // world_size, sampler=sampler)


def assert_same_result(found: NoiseCurvature | None, alone: NoiseCurvature | None, tolerance: float) -> None:
    """C, H and what duality makes of them; vectors of nearly equal eigenvalues may be any of their plane."""
    assert found is not None
    assert alone is not None
    assert (found.route, found.samples, found.batch_size) == (alone.route, alone.samples, alone.batch_size)
    for name in ("curvatures", "variances", "second_moments"):
        one, other = getattr(found, name), getattr(alone, name)
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=0.0, atol=tolerance * float(other.abs().max()))
    assert found.chain.keys() == alone.chain.keys()
    for name, link in alone.chain.items():
        assert found.chain[name].norm == pytest.approx(link.norm, rel=tolerance), name
        assert found.chain[name].distance == pytest.approx(link.distance, rel=tolerance), name
    assert found.weight_variance == pytest.approx(alone.weight_variance, rel=tolerance, nan_ok=True)
    assert found.unpaired == pytest.approx(alone.unpaired, abs=1e-12)


def assert_same_noise(together: Sequence[Outcome], alone: Outcome, tolerance: float) -> None:
    """All results, and all that is logged of them; both ranks have the same bits."""
    for outcome in together:
        assert len(outcome.results) == len(alone.results) > 0
        for found, expected in zip(outcome.results, alone.results, strict=True):
            assert_same_result(found, expected, tolerance)
        assert list(outcome.rows) == list(alone.rows)
        for step, row in alone.rows.items():
            assert outcome.rows[step].keys() == row.keys()
            for key, value in row.items():
                assert outcome.rows[step][key] == pytest.approx(value, rel=1e-7, abs=1e-10, nan_ok=True), key
    assert repr(together[0].rows) == repr(together[1].rows)
