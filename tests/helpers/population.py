"""Populations of samples that mini-batches are drawn from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_curvature.data.population import Population, read_population
from lightning_curvature.data.probe_set import ProbeBatch, ProbeSet
from tests.helpers.probe_sets import Plain
from tests.helpers.runs import make_trainer

# A correct draw fails a test of frequencies with at most this probability; the seeds are fixed.
FAILURE = 1e-6


class Populator(pl.Callback):
    """Reads the population before the first training batch."""

    def __init__(self, **options: Any) -> None:
        self.options = {"samples": None} | options
        self.population: Population | None = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.population = read_population(trainer, **self.options)


def populate(loader: Any, trainer_options: dict[str, Any] | None = None, **options: Any) -> Population:
    """Return the population of a run that trains on the loader."""
    reader = Populator(**options)
    make_trainer(reader, max_steps=1, **(trainer_options or {})).fit(Plain(), loader)
    assert reader.population is not None
    return reader.population


def given(loader: Any, **options: Any) -> Population:
    """Return the population of a given loader."""
    return read_population(make_trainer(), loader, **({"samples": None} | options))


def numbers(parts: Sequence[ProbeBatch]) -> list[int]:
    """Return the samples of a mini-batch of numbers."""
    assert all(part.size in (len(part.batch), 1) for part in parts)
    return [int(number) for part in parts for number in part.batch]


def assert_frequencies(counts: Sequence[int], probabilities: Sequence[float], scale: float = 1.0) -> None:
    """Compare the frequencies of several cases with their probabilities, by χ².

    P(χ²_k ≥ k + 2√(kx) + 2x) ≤ exp(−x) (Laurent & Massart 2000, lemma 1).
    """
    expected = [sum(counts) * probability for probability in probabilities]
    found = scale * sum((count - mean) ** 2 / mean for count, mean in zip(counts, expected, strict=True))
    freedom, x = len(counts) - 1, -math.log(FAILURE)
    assert found < freedom + 2 * math.sqrt(freedom * x) + 2 * x


def assert_same(one: ProbeSet, other: ProbeSet, equal: bool = False) -> None:
    """Compare all values; with ``equal``, the batches of ``one`` have equal weight."""
    assert (one.total, one.rounds, one.spread) == (other.count if equal else other.total, other.rounds, other.spread)
    for a, b in zip(one.batches, other.batches, strict=True):
        assert (a.size, a.seed, a.group, a.spread) == (1 if equal else b.size, b.seed, b.group, b.spread)
        assert a.batch.dtype == b.batch.dtype
        assert torch.equal(a.batch, b.batch)
