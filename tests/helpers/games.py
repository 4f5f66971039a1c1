"""Generative adversarial networks by manual optimization: two players, two optimizers."""

from __future__ import annotations

from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.runs import Batch, mlp

Player = Literal["critic", "generator"]


PLAYERS: tuple[Player, ...] = ("critic", "generator")  # in the order of their optimizers and of their steps


BATCHES, LR, TOLERANCE = 4, 0.05, 1e-6


class Gan(pl.LightningModule):
    """As in Lightning's own example: the critic's step, then the generator's against the critic that has stepped."""

    def __init__(self) -> None:
        super().__init__()
        self.generator, self.critic = mlp(2, 4, 3, seed=0), mlp(3, 4, 1, seed=1)
        self.automatic_optimization = False

    def task(self, player: Player, batch: Batch) -> tuple[nn.Module, Tensor, Tensor]:
        """What a player trains, on which inputs, for which answers."""
        noise, real = batch
        truth, lies = torch.ones(len(real), 1).to(real), torch.zeros(len(noise), 1).to(real)
        if player == "critic":
            return self.critic, torch.cat([self.generator(noise).detach(), real]), torch.cat([lies, truth])
        return nn.Sequential(self.generator, self.critic), noise, truth

    def player_loss(self, player: Player, batch: Batch) -> Tensor:
        network, x, y = self.task(player, batch)
        return F.binary_cross_entropy_with_logits(network(x), y)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        for player, optimizer in zip(PLAYERS, self.optimizers(), strict=True):  # type: ignore[arg-type]
            self.toggle_optimizer(optimizer)
            loss = self.player_loss(player, batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)
            self.log(f"{player}_loss", loss)

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(getattr(self, player).parameters(), lr=LR) for player in PLAYERS]


def data() -> list[Batch]:
    g = torch.Generator().manual_seed(2)
    draw = lambda size: torch.randn(8, size, generator=g, dtype=torch.float64)  # noqa: E731
    return [(draw(2), draw(3)) for _ in range(BATCHES)]
