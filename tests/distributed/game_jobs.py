"""Runs under FSDP2 of two players, each with an optimizer of its own, that step in turn by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lightning_curvature import BatchSharpnessMonitor, DirectionalCurvatureMonitor, HessianSpectrumMonitor
from lightning_curvature.distributed.shards import local
from tests.distributed.cases import EPSILON
from tests.distributed.fsdp2_jobs import strategy
from tests.helpers.games import PLAYERS, Gan, Player, data
from tests.helpers.runs import Capture, loader, make_trainer

MONITORS: dict[str, Callable[..., Any]] = {
    "directional": partial(DirectionalCurvatureMonitor, estimators=("finite_difference", "critical"), epsilon=EPSILON),
    "spectrum": partial(HessianSpectrumMonitor, quantities=("lambda_max", "lambda_min"), tolerance=0.3),
    # What is drawn of whole batches is not drawn alike on one process and on two.
    "sharpness": partial(BatchSharpnessMonitor, quantities=("step_sharpness",)),
}


@dataclass
class Outcome:
    """What a process has after a run.

    Attributes:
        rows: what the logger got, by step.
        state: this process's part of all parameters and of the state of both optimizers, and the random numbers'.
    """

    rows: dict[int, dict[str, float]]
    state: dict[str, Tensor]


class ShardedGan(Gan):
    """Each linear layer of each player is a unit of its own."""

    def configure_model(self) -> None:
        if self._device_mesh is None or isinstance(self.critic[0].weight, DTensor):
            return
        for network in (self.generator, self.critic):
            for unit in (network[0], network[2], network):
                fully_shard(unit, mesh=self._device_mesh["data_parallel"])


def play(name: str | None, player: Player, rank: int = 0, world_size: int = 1) -> Outcome:
    """A game followed for one of the players, or for none."""
    capture, follow = Capture(), []
    if name is not None:
        options = {"every_n_train_steps": 1, "optimizer_index": PLAYERS.index(player), "on_error": "raise"}
        follow = [MONITORS[name](objective=lambda module, batch: module.player_loss(player, batch), **options)]
    parallel = {"strategy": strategy(), "devices": world_size} if world_size > 1 else {}
    options = {"precision": "32-true", "use_distributed_sampler": False, "logger": capture}
    trainer, module = make_trainer(*follow, **options, **parallel), ShardedGan()
    trainer.fit(module, loader([tuple(t.tensor_split(world_size)[rank] for t in batch) for batch in data()]))
    state = {key: local(p).detach().clone() for key, p in module.named_parameters()}
    for index, optimizer in enumerate(trainer.optimizers):
        for number, entries in enumerate(optimizer.state.values()):
            state |= {f"{index} {number} {key}": local(value).clone() for key, value in entries.items()}
    return Outcome(capture.rows, state | {"random numbers": torch.get_rng_state()})


GAMES = {f"{name}_{player}": partial(play, name, player) for name in MONITORS for player in PLAYERS}
unwatched = partial(play, None, "critic")
globals().update(GAMES)
