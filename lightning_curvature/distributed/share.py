"""Work that depends on nothing but what all ranks hold: each piece is done by one of them, and all get all results."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_curvature.distributed.together import together


@dataclass(frozen=True)
class Piece:
    """A piece of work.

    Attributes:
        make: returns its result, float64; must not communicate.
        shape: of the result.
        cost: how long it takes, in any unit.
    """

    make: Callable[[], Tensor]
    shape: tuple[int, ...]
    cost: float = 1.0


def each_alone(pieces: Mapping[str, Piece]) -> dict[str, Tensor]:
    """Return the results of all pieces, made by this process."""
    return {name: piece.make() for name, piece in pieces.items()}


def shared_out(trainer: pl.Trainer, device: torch.device, what: str, pieces: Mapping[str, Piece]) -> dict[str, Tensor]:
    """Return the results of all pieces, each made by one rank; where one fails, all of them raise. One all-reduce.

    All ranks get the same bits, those of one process. ``device`` is that of the results, and ``what`` names the work.

    Raises:
        Exception: see :func:`~.distributed.together.together`.
    """
    owner = owners([piece.cost for piece in pieces.values()], trainer.world_size)
    zero = torch.zeros((), dtype=torch.float64, device=device)
    others = {name: zero.expand(piece.shape) for name, piece in pieces.items()}

    def make() -> dict[str, Tensor]:
        mine = [name for name, rank in zip(pieces, owner, strict=True) if rank == trainer.global_rank]
        return others | {name: pieces[name].make() for name in mine}

    return together(trainer, make, others, what)


def owners(costs: list[float], ranks: int) -> list[int]:
    """Return the rank of each piece: the costliest first, each to the rank that has the least to do.

    Example:
        >>> owners([1.0, 1.0, 2.0], ranks=2)
        [1, 1, 0]
    """
    loads, owner = [0.0] * ranks, [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owner[index] = loads.index(min(loads))
        loads[owner[index]] += costs[index]
    return owner
