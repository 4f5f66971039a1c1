"""A run watched by HessianSpectrumMonitor that one process, or two together, make of the same data, and its numbers."""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

from lightning_curvature import CurvatureWarning, HessianSpectrumMonitor
from lightning_curvature.monitors.protocol import Prepared
from lightning_curvature.spectrum.options import QUANTITIES
from lightning_curvature.spectrum.problem import SpectrumProblem
from lightning_curvature.spectrum.result import Spectrum
from tests.distributed.cases import collectives, state_of
from tests.helpers.runs import Capture, classification, make_trainer, own, rows

# In batches of four: six, the last of two samples. Three groups of two are the data of a step: two go to one rank, one
# to the other.
SAMPLES, STEP, MICRO = 22, 8, 4
# Steps made: the data of an epoch that two processes share differs from that of one in its last, ragged step alone.
STEPS = 3


def dataset(count: int = SAMPLES, dtype: torch.dtype = torch.float64) -> TensorDataset:
    """Samples of a classification."""
    return TensorDataset(*classification(1, count, dtype=dtype)[0])


# What is being measured in this process. It belongs to a thread, so that no measurement puts it back.
Measuring: Any = threading.local()
Measuring.step, Measuring.calls = None, 0


class Observed(HessianSpectrumMonitor):
    """The monitor, and what can be seen from around its measurements."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.outcome: Outcome | None = None

    def measure(self, trainer: pl.Trainer, prepared: Prepared[SpectrumProblem]) -> Spectrum:
        counted = replace(prepared, problem=replace(prepared.problem, on_product=self._count))
        spectrum = super().measure(trainer, counted)
        self.seen.nodes.append(None if spectrum.density is None else spectrum.density.nodes)
        states = {kind: tracker.state_dict() for kind, tracker in self._measurement.trackers.items()}
        found = {kind: state["pairs"]["vectors"] for kind, state in states.items() if state}
        self.seen.vectors.append({kind: [v.clone() for v in vectors] for kind, vectors in found.items()})
        return spectrum

    @property
    def seen(self) -> Outcome:
        assert self.outcome is not None
        return self.outcome

    def _count(self) -> None:
        self.seen.products[-1] += 1

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        before, state = collectives(), state_of(pl_module, trainer)
        self.seen.products.append(0)
        Measuring.step, Measuring.calls = trainer.global_step, 0
        try:
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        finally:
            Measuring.step = None
        self.seen.collectives.append(collectives() - before)
        after = state_of(pl_module, trainer)
        self.seen.intact.append(state.keys() == after.keys() and all(state[k].equal(v) for k, v in after.items()))


class Watch(pl.Callback):
    """Notes what other callbacks can watch."""

    def __init__(self, metrics: list[dict[str, float]]) -> None:
        self.metrics = metrics

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.metrics.append(own({key: float(value) for key, value in trainer.callback_metrics.items()}))


@dataclass
class Outcome:
    """What a process has after a run; lists are by batch, or by measurement.

    Attributes:
        rows: what the monitor wrote, by step, keys without prefix.
        metrics: the monitor's share of ``trainer.callback_metrics``.
        nodes: of the density, by measurement.
        vectors: eigenvectors by operator, by measurement.
        products: products made.
        collectives: collectives that the monitor took part in.
        intact: whether the state after the monitor's hook was that before it.
        said: warnings of the package, as a user sees them.
        state: this process's part of the state at the end.
    """

    rows: dict[int, dict[str, float]] = field(default_factory=dict)
    metrics: list[dict[str, float]] = field(default_factory=list)
    nodes: list[Tensor | None] = field(default_factory=list)
    vectors: list[dict[str, list[Tensor]]] = field(default_factory=list)
    products: list[int] = field(default_factory=list)
    collectives: list[int] = field(default_factory=list)
    intact: list[bool] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    state: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class SpectrumCase:
    """A run, ready to be made by one process or several.

    Attributes:
        module: makes the module.
        data: makes the dataset.
        step: samples of a step, over all ranks.
        monitor: options of the monitor.
        trainer: options of the Trainer.
        alone: options of the monitor of one process, where they differ.
        callbacks: makes others.
        strategy: of several processes.
        shuffle: whether the loader shuffles; several ranks then have the sampler that Lightning puts in.
        shared: whether ranks share the data of a step; else each makes the whole of it.
        steps: optimizer steps.
        watched: whether there is a monitor at all.
    """

    module: Callable[[], pl.LightningModule]
    data: Callable[[], Dataset[Any]] = dataset
    step: int = STEP
    monitor: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    alone: dict[str, Any] = field(default_factory=dict)
    callbacks: Callable[[], list[pl.Callback]] = list
    strategy: Callable[[], Any] | str = "ddp"
    shuffle: bool = False
    shared: bool = True
    steps: int = STEPS
    watched: bool = True

    def unwatched(self) -> SpectrumCase:
        """The same run without the monitor."""
        return replace(self, watched=False)

    def __call__(self, rank: int = 0, world_size: int = 1, ckpt_path: str | None = None) -> Outcome:
        outcome, capture, module = Outcome(), Capture(), self.module()
        own = {} if world_size > 1 else self.alone
        # Sums are compared, not what they are estimates of: few starts and samples do.
        few = {"trace_error": 0.5, "density_starts": 1, "density_steps": 3}
        # Searches that begin anew have all numbers, also after one that failed.
        options = {
            "quantities": QUANTITIES,
            "every_n_train_steps": 1,
            "micro_batch_size": MICRO,
            "recheck_every": 1,
        } | few
        follow = Observed(**(options | self.monitor | own))
        follow.outcome = outcome
        callbacks = [follow, Watch(outcome.metrics)] if self.watched else []
        strategy = self.strategy() if callable(self.strategy) else self.strategy
        parallel = {"strategy": strategy, "devices": world_size} if world_size > 1 else {}
        limits = {"max_steps": self.steps, "max_epochs": self.steps}  # an epoch has a step or more
        trainer = make_trainer(*callbacks, *self.callbacks(), logger=capture, **(limits | parallel | self.trainer))
        size = self.step // world_size if self.shared else self.step
        data, sampler = self.data(), None
        if world_size > 1 and self.shared and not self.shuffle:
            # Rows in turn: the batches of both make that of one process. Lightning's own would shuffle.
            sampler = DistributedSampler(data, world_size, rank, shuffle=False)
        loader: DataLoader[Any] = DataLoader(data, batch_size=size, shuffle=self.shuffle, sampler=sampler)
        torch.manual_seed(3)  # of shuffling
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            trainer.fit(module, loader, ckpt_path=ckpt_path)
        outcome.said = [str(w.message) for w in caught if issubclass(w.category, CurvatureWarning)]
        outcome.rows |= rows(capture)
        outcome.state = state_of(module, trainer)
        assert trainer.global_step == self.steps
        return outcome


def assert_same_spectra(together: Sequence[Outcome], alone: Outcome, tolerance: float) -> None:
    """Every number of every step is that of one process."""
    for outcome in together:
        assert outcome.rows.keys() == alone.rows.keys()
        for step, expected in alone.rows.items():
            row = outcome.rows[step]
            assert row.keys() == expected.keys()
            for key, value in expected.items():
                # Errors are small beside what they are errors of: relative for eigenvalues, not for the trace. Shares
                # are parts of 1.
                whole = key.endswith(("_error", "_converged")) or "_share/" in key
                size = 1.0 if whole else abs(expected[key.replace("_stderr", "")])
                assert row[key] == pytest.approx(value, rel=0.0, abs=tolerance * size, nan_ok=True), (step, key)
        for nodes, expected_nodes in zip(outcome.nodes, alone.nodes, strict=True):
            assert (nodes is None) == (expected_nodes is None)
            if nodes is not None and expected_nodes is not None:
                scale = float(expected_nodes.abs().max())
                torch.testing.assert_close(nodes, expected_nodes, rtol=0.0, atol=tolerance * scale)


def assert_complete(outcome: Outcome, undefined: Sequence[str] = ()) -> None:
    """Every measured number is one, but for those named at step 0."""
    assert list(outcome.rows) == list(range(len(outcome.rows)))
    for step, row in outcome.rows.items():
        lost = {key for key, value in row.items() if math.isnan(value)}
        assert lost == (set(undefined) if step == 0 else set()), step


def assert_same_bits(first: Outcome, second: Outcome) -> None:
    """Both processes wrote, hold and keep the same."""
    # As text, in which a NaN equals a NaN and distinct numbers differ.
    assert repr(first.rows) == repr(second.rows)
    assert repr(first.metrics) == repr(second.metrics)
    assert first.products == second.products
    for a, b in zip(first.nodes, second.nodes, strict=True):
        assert (a is None) == (b is None)
        assert a is None or b is None or torch.equal(a, b)
