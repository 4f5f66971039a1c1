"""The measurement protocol of all families: options → ``prepare`` → ``Prepared`` → ``measure`` → a frozen result."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, Protocol, TypeVar

import lightning.pytorch as pl
import torch

from lightning_curvature.distributed.together import Tensors, together
from lightning_curvature.reporting.progress import Progress

Problem = TypeVar("Problem")


class Result(Protocol):
    """Result of a measurement, frozen."""

    @property
    def reasons(self) -> Mapping[str, str]:
        """Why values are NaN, by key."""

    def values(self) -> dict[str, float]:
        """Return all values with their errors by key; NaN where one could not be measured."""


@dataclass(frozen=True)
class Prepared(Generic[Problem]):
    """Inputs of one measurement.

    Attributes:
        problem: the inputs that the family defines.
        progress: shows that the measurement is under way.
        capacities: by name, reduced by minimum: vectors that fit into memory, or whether a route is possible, 1 or 0.
    """

    problem: Problem
    progress: Progress
    capacities: Mapping[str, float] = field(default_factory=dict)


def prepare_together(
    trainer: pl.Trainer, prepare: Callable[[], Prepared[Problem]], capacities: Sequence[str]
) -> Prepared[Problem]:
    """Prepare a measurement on every rank and reduce the named capacities by minimum. One collective.

    ``prepare`` must not communicate. Where it fails on one rank, every rank raises.
    """
    prepared: list[Prepared[Problem]] = []
    empty = torch.zeros(trainer.world_size, len(capacities), dtype=torch.float64, device="cpu")

    def make() -> Tensors:
        prepared.append(prepare())
        table = torch.zeros_like(empty)
        table[trainer.global_rank] = table.new_tensor([prepared[0].capacities[name] for name in capacities])
        return {"capacities": table}

    table = together(trainer, make, {"capacities": empty}, "preparing the measurement")["capacities"]
    return replace(prepared[0], capacities=dict(zip(capacities, table.amin(0).tolist(), strict=True)))
