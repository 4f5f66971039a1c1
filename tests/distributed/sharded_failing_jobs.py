"""Runs with parameters in shards in which a forward or backward fails on one of two processes alone."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.distributed import fsdp2_jobs
from tests.distributed.cases import Case, batches
from tests.distributed.failing_jobs import Failing, Midway
from tests.helpers.runs import Batch

PAIR = ("kl", "finite_difference")
# Before the first of three units, between the second and the third, after the last.
PLACES = ("first", "middle", "last")


class AloneFailing(Failing, fsdp2_jobs.Sharded):
    """Fails on one process, somewhere among its units."""

    def __init__(self, place: str, repetition: int, step: int, rank: int = 1) -> None:
        torch.manual_seed(0)
        first, middle, last = places = [Midway() for _ in PLACES]
        layers = [first, nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), middle, nn.Linear(6, 3), last]
        super().__init__(repetition, (rank,), nn.Sequential(*layers).double(), step)
        places[PLACES.index(place)].fails_now.append(super().fails_now)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x)


def failing(
    place: str,
    repetition: int,
    step: int = 1,
    estimators: tuple[str, ...] = PAIR,
    kind: type[AloneFailing] = AloneFailing,
    **options: Any,
) -> Case:
    return fsdp2_jobs.case(partial(kind, place, repetition, step), estimators=estimators, **options)


def nested(repetition: int, step: int = 3) -> Case:
    """Two batches a step, of which each is evaluated twice."""
    accumulated = {"batches": partial(batches, 8), "trainer": {"accumulate_grad_batches": 2}}
    return failing("middle", repetition, step, kind=Nested, **accumulated)


class Nested(AloneFailing):
    """Units inside a unit, the root with parameters of its own, and gatherings before their time."""

    def configure_model(self) -> None:
        if self._device_mesh is None or any(isinstance(p, DTensor) for p in self.parameters()):
            return
        first, second, _ = (m for m in self.network if isinstance(m, nn.Linear))
        block = nn.Sequential(second, nn.Sequential(*self.network[4:6]))
        self.network = nn.Sequential(*self.network[:3], block, self.network[6], nn.Linear(3, 3).double())
        for unit in (first, second, block, self.network):
            fully_shard(unit, mesh=self._device_mesh["data_parallel"])
        first.set_modules_to_forward_prefetch([block])


class Grouped(AloneFailing):
    """Two layers that are gathered as one; it fails between them."""

    def configure_model(self) -> None:
        if self._device_mesh is not None and not any(isinstance(p, DTensor) for p in self.parameters()):
            _, *pair = (m for m in self.network if isinstance(m, nn.Linear))
            for unit in (pair, self.network):
                fully_shard(unit, mesh=self._device_mesh["data_parallel"])


class Hidden(AloneFailing):
    """With kinks that the loss depends on, and others beside it, which its graph does not show."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = super().forward(x).relu()
        self.log("largest", z.detach().max(-1).values.clamp(max=1.0).mean())
        return z


class Headed(AloneFailing):
    """Has a loss that is no likelihood, whose head is cut off."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.loss = fsdp2_jobs.focal


class Unrecorded(AloneFailing):
    """Holds, on one process and at one step, something that no repetition could put back: it cannot be recorded."""

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        self.source = iter(()) if self.fails_now() else None


# By name: a run, and which of its measurements is lost. The first has one repetition more, which checks the step.
FORWARDS: dict[str, tuple[Case, int]] = {}
for place in PLACES:
    FORWARDS[f"{place}_unit"] = failing(place, 1), 1
    FORWARDS[f"{place}_unit_of_the_second_forward"] = failing(place, 2), 1
    FORWARDS[f"{place}_unit_at_first"] = failing(place, 2, 0), 0
    FORWARDS[f"{place}_unit_in_the_check"] = failing(place, 1, 0), 0
FORWARDS |= {f"nested_{repetition}": (nested(repetition), 1) for repetition in range(1, 5)}
FORWARDS |= {f"grouped_{repetition}": (failing("middle", repetition, kind=Grouped), 1) for repetition in (1, 2)}
FORWARDS["nested_check"] = nested(1, 1), 0
# The check, then two forwards that look at the kinks beside the loss.
FORWARDS |= {f"hidden_{repetition}": (failing("middle", repetition, 0, kind=Hidden), 0) for repetition in (1, 4, 5)}
FORWARDS["hidden_later"] = failing("middle", 1, kind=Hidden), 1
# The check, two forwards to cut off the head, and two evaluations of the head.
FORWARDS |= {f"headed_{repetition}": (failing("middle", repetition, 0, kind=Headed), 0) for repetition in (1, 6, 7)}
FORWARDS["headed_later"] = failing("middle", 2, kind=Headed), 1
FORWARDS |= {f"unrecorded_{step}": (failing("middle", -1, step, kind=Unrecorded), step) for step in (0, 1)}
FORWARDS["one_sided"] = failing("middle", 1, estimators=("kl",)), 1
FORWARDS["search"] = failing("middle", 2, estimators=("critical",)), 1
LOOKS = {f"looking_{repetition}": failing("middle", repetition, 0, kind=Hidden) for repetition in (2, 3)}
LOOKS |= {f"headed_cut_{repetition}": failing("middle", repetition, 0, kind=Headed) for repetition in (2, 3)}

whole = failing("first", -1)
whole_nested, whole_hidden = nested(-1), failing("first", -1, kind=Hidden)
whole_headed, whole_grouped = (failing("first", -1, kind=kind) for kind in (Headed, Grouped))
whole_one_sided, whole_search = (failing("first", -1, estimators=(name,)) for name in ("kl", "critical"))
unwatched, nested_unwatched, hidden_unwatched = (case.unwatched() for case in (whole, whole_nested, whole_hidden))
headed_unwatched, grouped_unwatched = whole_headed.unwatched(), whole_grouped.unwatched()
looking_unwatched = hidden_unwatched

JOBS = [*FORWARDS, *LOOKS, *(name for name, value in list(globals().items()) if isinstance(value, Case))]
globals().update({name: case for name, (case, _) in FORWARDS.items()} | LOOKS)
