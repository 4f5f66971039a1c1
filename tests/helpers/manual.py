"""Manual optimization, as users write it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.helpers.runs import (
    Batch,
    Classifier,
    MakeOptimizer,
)

# Below the norms (0.2 to 0.7) and the largest entries (up to 0.3) of these gradients.
CLIP_AT = {"norm": 0.2, "value": 0.05}


class Manual(Classifier):
    """The loop of Lightning's own guide: the loss over N, a step every N batches; optionally clipped."""

    def __init__(self, network: nn.Module, make: MakeOptimizer, window: int = 1, clip: str | None = None) -> None:
        super().__init__(network, make)
        self.automatic_optimization = False
        self.window, self.clip = window, clip

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        self.manual_backward(self.loss(self(batch[0]), batch[1]) / self.window)
        if (batch_idx + 1) % self.window == 0:
            if self.clip is not None:
                threshold = CLIP_AT[self.clip]
                self.clip_gradients(optimizer, gradient_clip_val=threshold, gradient_clip_algorithm=self.clip)
            optimizer.step()
            optimizer.zero_grad()
            scheduler: Any = self.lr_schedulers()
            if scheduler is not None:
                scheduler.step()


def momentum(m: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(m.parameters(), lr=0.2, momentum=0.5)
