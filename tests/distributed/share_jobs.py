"""Pieces of work that two processes, or one, share out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_curvature.distributed.share import Piece, shared_out
from tests.distributed.cases import collectives
from tests.helpers.runs import make_trainer

CPU = torch.device("cpu")


class Ranks:
    """What sharing asks of a Trainer."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.global_rank, self.world_size, self.strategy = rank, world_size, make_trainer().strategy


def shared(rank: int = 0, world_size: int = 1) -> tuple[dict[str, Tensor], list[str], int]:
    made: list[str] = []

    def piece(name: str, value: Tensor, cost: float) -> Piece:
        def make() -> Tensor:
            made.append(name)
            return value

        return Piece(make, tuple(value.shape), cost)

    third = torch.tensor(1.0, dtype=torch.float64) / 3.0
    pieces = {
        "large": piece("large", third.expand(2, 3) * torch.arange(6.0).reshape(2, 3).double(), 2.0),
        "small": piece("small", torch.tensor([-torch.inf, 1e-300], dtype=torch.float64), 1.0),
        "empty": piece("empty", torch.zeros(0, dtype=torch.float64), 0.1),
    }
    trainer: Any = Ranks(rank, world_size)
    before = collectives()
    return shared_out(trainer, CPU, "work", pieces), made, collectives() - before


def broken(rank: int, world_size: int) -> str:
    def fail() -> Tensor:
        raise ValueError("broken")

    pieces = {"one": Piece(fail, (1,), 2.0), "other": Piece(lambda: torch.ones(1, dtype=torch.float64), (1,))}
    trainer: Any = Ranks(rank, world_size)
    try:
        shared_out(trainer, CPU, "work", pieces)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"
