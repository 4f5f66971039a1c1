"""Runs of the monitor of regimes on one process or two, whose losses differ by rank."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.distributed.cases import Outcome, Spy, state_of
from tests.helpers.regimes import Oscillation, Quadratic, Raise, monitor, sgd, steps
from tests.helpers.runs import Capture, make_trainer

COUNT, AT, EVERY = 50, 20, 5


class Uneven(Quadratic):
    """Its loss has another offset on each rank, and the same gradient; the mean over both is that of one process."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        sign = 2 * self.trainer.global_rank - 1 if self.trainer.world_size > 1 else 0
        loss = super().training_step(batch, batch_idx)
        # On one of the ranks the loss alone would be noise, on the other another.
        return loss + sign * 0.3 * torch.sin(torch.tensor(7.0 * batch_idx, dtype=torch.float64))


def run(rank: int, world_size: int, watched: bool, actions: tuple[str, ...] = (), **options: Any) -> Outcome:
    """One run."""
    torch.manual_seed(0)  # the loader draws a number, which it throws away
    capture, spy = Capture(), Spy()
    follow = [monitor(on_alarm=actions, **options)] if watched else []
    parallel = {"strategy": "ddp", "devices": world_size} if world_size > 1 else {}
    trainer = make_trainer(
        *follow,
        *([Oscillation()] if actions else []),
        Raise(AT, 1.2 / 0.95),
        spy,
        logger=capture,
        use_distributed_sampler=False,
        **parallel,
    )
    module = Uneven(sgd(0.95))
    spy._forwards = 0
    trainer.fit(module, steps(COUNT))
    losses = [{"loss": loss} for one in follow for loss in one._history.losses]
    return Outcome(capture.rows, spy.collectives, [], losses, state_of(module, trainer), trainer.global_step)


def lowered(rank: int = 0, world_size: int = 1) -> Outcome:
    return run(rank, world_size, True, ("warn", "lower_lr"))


def stopped(rank: int = 0, world_size: int = 1) -> Outcome:
    return run(rank, world_size, True, ("stop",))


def saved(rank: int = 0, world_size: int = 1) -> Outcome:
    """With the names of the files that are left, by one folder for all ranks."""
    with tempfile.TemporaryDirectory() as folder:
        shared = folder
        if world_size > 1:
            given = [folder]
            dist.broadcast_object_list(given, src=0)
            shared = given[0]
        outcome = run(rank, world_size, True, ("checkpoint",), dirpath=shared, checkpoint_every_n_steps=4)
        outcome.metrics = [dict.fromkeys(sorted(os.listdir(shared)), 0.0)]
        if world_size > 1:
            dist.barrier()
        return outcome


def watched(rank: int = 0, world_size: int = 1) -> Outcome:
    return run(rank, world_size, True, (), every_n_train_steps=EVERY)


def unwatched(rank: int = 0, world_size: int = 1) -> Outcome:
    return run(rank, world_size, False)


JOBS = ["lowered", "stopped", "saved", "watched", "unwatched"]
