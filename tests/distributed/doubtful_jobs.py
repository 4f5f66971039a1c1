"""Runs in which the slope of the loss by its outputs is not gᵀd: a step is measured once more, by all ranks or none."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tests.distributed import fsdp2_jobs
from tests.distributed.cases import Case, momentum
from tests.distributed.failing_jobs import Failing
from tests.distributed.sharded_failing_jobs import AloneFailing
from tests.helpers.runs import Batch, Classifier

PAIR = ("kl", "finite_difference")


def is_second() -> bool:
    """Whether this is the second of two processes."""
    return dist.is_initialized() and dist.get_rank() == 1


class Dimmed(nn.Module):
    """Passes a quarter of the gradient on, on the second process alone or on all."""

    def __init__(self, alone: bool) -> None:
        super().__init__()
        self.alone = alone

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and (is_second() or not self.alone):
            x = x * 1.0
            x.register_hook(lambda gradient: 0.25 * gradient)
        return x


def dimmed(alone: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), Dimmed(alone), nn.Linear(6, 3)).double()


def doubtful(alone: bool = False) -> fsdp2_jobs.Sharded:
    return fsdp2_jobs.Sharded(dimmed(alone), momentum)


class HeadFailing(AloneFailing):
    """Cannot repeat the first step on one process, where it is measured once more."""

    def __init__(self, repetition: int, error: type[Exception]) -> None:
        Failing.__init__(self, repetition, (1,), dimmed(), 0)
        self.error = error

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if Failing.fails_now(self):
            raise self.error("fails on purpose")
        return loss


class Once(torch.autograd.Function):
    """The identity, with one derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def without_head_on_the_second(z: Tensor, y: Tensor) -> Tensor:
    """A likelihood on one process; on the other neither that, nor a loss with second derivatives."""
    return fsdp2_jobs.focal(Once.apply(z), y) if is_second() else F.cross_entropy(z, y)


sharded = fsdp2_jobs.case(doubtful, estimators=("kl",), monitor={"epsilon": "auto"})
sharded_pair = replace(sharded, estimators=PAIR)
sharded_on_one = replace(sharded, module=partial(doubtful, True))
sharded_unwatched = sharded.unwatched()
# The check and the evaluation come first, then two repetitions that cut off the head, and two of the head alone.
sharded_failing = {
    f"sharded_failing_{number}_{error.__name__}": replace(sharded, module=partial(HeadFailing, number, error))
    for number in (3, 4, 6)
    for error in (RuntimeError, KeyError)
}
globals().update(sharded_failing)
sharded_lost = replace(sharded, module=partial(HeadFailing, 7, RuntimeError))
unread = Case(lambda: Classifier(dimmed(), momentum, without_head_on_the_second), estimators=PAIR)
unread_unwatched = unread.unwatched()

SHARDED = [name for name, value in list(globals().items()) if isinstance(value, Case) and name.startswith("sharded")]
DDP = ["unread", "unread_unwatched"]
