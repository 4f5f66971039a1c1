"""Runs that each family's monitor watches on one process or two: jobs by the name of the monitor."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from tests.distributed.cases import collectives, state_of
from tests.helpers.runs import Capture, Classifier, classification, make_trainer, mlp, rows
from tests.testers.families import FAMILIES

UNWATCHED = "unwatched"
STEPS, BATCH = 3, 8


@dataclass
class Outcome:
    """A run in one process: logged rows by step, collectives by batch, and the state at the end."""

    rows: dict[int, dict[str, float]]
    collectives: list[int]
    state: dict[str, Tensor]


class Count(pl.Callback):
    """Collectives of each batch, with what is measured after its step by callbacks that come later."""

    def __init__(self) -> None:
        self._marks: list[int] = []

    @property
    def found(self) -> list[int]:
        return [after - before for before, after in itertools.pairwise(self._marks)]

    def on_train_batch_start(self, *args: Any) -> None:
        self._marks.append(collectives())

    def on_train_end(self, *args: Any) -> None:
        self._marks.append(collectives())


def job(name: str) -> Callable[..., Outcome]:
    """Return the run that the monitor of a name watches, or none."""

    def run(rank: int = 0, world_size: int = 1) -> Outcome:
        watching = []
        if name != UNWATCHED:
            family = FAMILIES[name]
            watching = [family.make_few(every_n_train_steps=1, **family.rank_options)]
        count, capture = Count(), Capture()
        parallel = {"strategy": "ddp", "devices": world_size} if world_size > 1 else {}
        trainer = make_trainer(count, *watching, logger=capture, use_distributed_sampler=False, **parallel)
        data = TensorDataset(*classification(1, STEPS * BATCH)[0])
        # Rows in turn: the batches of both make that of one process.
        sampler = DistributedSampler(data, world_size, rank, shuffle=False) if world_size > 1 else None
        module = Classifier(mlp(4, 5, 3), lambda m: torch.optim.SGD(m.parameters(), lr=0.3, momentum=0.5))
        trainer.fit(module, DataLoader(data, batch_size=BATCH // world_size, sampler=sampler))
        return Outcome(rows(capture), count.found, state_of(module, trainer))

    return run


globals().update({name: job(name) for name in (*FAMILIES, UNWATCHED)})
