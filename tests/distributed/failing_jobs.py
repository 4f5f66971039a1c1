"""Runs in which a repeated step fails, on one process only or on both."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.distributed import ddp_jobs, fsdp2_jobs
from tests.distributed.cases import EVERY, Case, momentum
from tests.helpers.counting import out_of_reach
from tests.helpers.runs import Batch, Classifier, mlp

# The optimizer step whose measurement fails.
FAILING_STEP = 1
MESSAGE = "fails on purpose"


# Calls of training_step in the current batch; put back by no measurement.
tally = out_of_reach(SimpleNamespace(step=0, calls=0))


class Failing(Classifier):
    """Raises in one repetition of one step: number ``repetition`` (the step itself is call 0)."""

    def __init__(
        self,
        repetition: int,
        ranks: tuple[int, ...] = (1,),
        network: nn.Module | None = None,
        step: int = FAILING_STEP,
    ) -> None:
        super().__init__(network or mlp(4, 6, 3), momentum)
        self.repetition, self.ranks, self.failing_step = repetition, ranks, step

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        tally().step, tally().calls = batch_idx, -1

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        tally().calls += 1
        return super().training_step(batch, batch_idx)

    def fails_now(self) -> bool:
        rank = dist.get_rank() if dist.is_initialized() else 0
        return tally().step == self.failing_step and tally().calls == self.repetition and rank in self.ranks

    def forward(self, x: Tensor) -> Tensor:
        if self.fails_now():
            raise RuntimeError(MESSAGE)
        return super().forward(x)


class Unrecorded(Failing):
    """Holds, on the failing rank and step, something that no repetition could put back: it cannot be recorded."""

    def __init__(self, step: int = FAILING_STEP) -> None:
        super().__init__(-1, step=step)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        self.source = iter(()) if self.fails_now() else None


def failing(repetition: int, estimators: tuple[str, ...] = EVERY, **options: Any) -> Case:
    return Case(partial(Failing, repetition, **options), estimators=estimators)


# EVERY makes the pair first (repetitions 1 and 2), then the search.
in_first_forward = failing(1)
in_second_forward = failing(2)
in_search = failing(4)
in_search_of_rank_0 = failing(3, ranks=(0,))
in_search_alone = failing(2, ("critical",))
in_default_pair = failing(2, ("kl", "finite_difference"))
in_forward_mode = failing(1, ("gauss_newton",))
in_double_backward = failing(1, ("hvp",))
in_recording = Case(Unrecorded)
unwatched = ddp_jobs.sgd_64.unwatched()

DDP_JOBS = [name for name, value in list(globals().items()) if isinstance(value, Case)]


class Midway(nn.Module):
    """Fails in the middle of a forward, between layers that FSDP2 has gathered and those it has not."""

    def __init__(self) -> None:
        super().__init__()
        self.fails_now: list[Callable[[], bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        if any(fails() for fails in self.fails_now):
            raise RuntimeError(MESSAGE)
        return x.tanh()


class ShardedFailing(Failing, fsdp2_jobs.Sharded):
    """Fails on both processes, between two layers."""

    def __init__(self, repetition: int) -> None:
        torch.manual_seed(0)
        midway = Midway()
        network = nn.Sequential(nn.Linear(4, 6), midway, nn.Linear(6, 3)).double()
        super().__init__(repetition, (0, 1), network)
        midway.fails_now.append(super().fails_now)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


sharded = fsdp2_jobs.case(partial(ShardedFailing, 2), estimators=("kl", "finite_difference"))
sharded_search = fsdp2_jobs.case(partial(ShardedFailing, 3), estimators=("critical",))
sharded_unwatched = sharded.unwatched()

FSDP2_JOBS = [name for name, value in list(globals().items()) if name not in DDP_JOBS and isinstance(value, Case)]


# The first measurement also settles how far the others evaluate.
at_first_step = Case(partial(Unrecorded, 0), estimators=("kl", "finite_difference"), monitor={"epsilon": "auto"})

strict = {"monitor": {"on_error": "raise"}}
fatal = [
    Case(partial(Failing, 1), estimators=("kl", "finite_difference"), **strict),
    Case(partial(Failing, 2), estimators=EVERY, **strict),
    Case(partial(Failing, 3), estimators=("critical",), **strict),
    Case(partial(Failing, 1), estimators=("hvp",), **strict),
]


def raised(rank: int, world_size: int) -> list[str]:
    """How each of the fatal runs ends, and that the processes are in step afterwards."""
    ends = []
    for case in fatal:
        try:
            case(rank, world_size)
        except Exception as error:
            ends.append(f"{type(error).__name__}: {error}")
        dist.barrier()
    return ends


fatal_search = fatal[2]
