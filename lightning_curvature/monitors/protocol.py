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
    """What a measurement returns: frozen, and it knows its keys."""

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
        capacities: numbers by name of which every rank must use the same, the smallest over the ranks: how many vectors
            fit into its memory, say, or 1 where it can take a route and 0 where it cannot.
    """

    problem: Problem
    progress: Progress
    capacities: Mapping[str, float] = field(default_factory=dict)


def prepare_together(
    trainer: pl.Trainer, prepare: Callable[[], Prepared[Problem]], capacities: Sequence[str]
) -> Prepared[Problem]:
    """Prepare a measurement on every rank and reduce the capacities by minimum. One collective.

    Args:
        trainer: its ranks.
        prepare: prepares on this rank; may fail, must not communicate.
        capacities: their names.

    Raises:
        Exception: this rank's error, or that preparing failed on another rank.
    """
    prepared: list[Prepared[Problem]] = []
    shape = (trainer.world_size, len(capacities))
    empty = torch.zeros(shape, dtype=torch.float64, device="cpu")

    def make() -> Tensors:
        prepared.append(prepare())
        table = torch.zeros_like(empty)
        table[trainer.global_rank] = torch.tensor([prepared[0].capacities[name] for name in capacities])
        return {"capacities": table}

    table = together(trainer, make, {"capacities": empty}, "preparing the measurement")["capacities"]
    return replace(prepared[0], capacities=dict(zip(capacities, table.amin(0).tolist(), strict=True)))
