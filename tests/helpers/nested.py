"""A module within a module, and everything of it that must not change."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from tests.helpers.runs import Classifier, mlp
from tests.helpers.setups import sgd, with_batchnorm
from tests.helpers.witness import frozen, module_state, random_states


class Nested(pl.LightningModule):
    """Holds another LightningModule, has gradients, is partly in eval mode, and draws and counts in its step."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Classifier(nn.Sequential(with_batchnorm(), nn.Dropout(0.3)), sgd)
        self.head = mlp(3, 3)
        self.head[0].bias.requires_grad_(False)
        self.count = 0
        for p in self.parameters():
            p.grad = torch.ones_like(p) if p.requires_grad else None
        self.inner.network[0].eval()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.count += 1
        self.log("count", float(self.count))
        return nn.functional.cross_entropy(self.head(self.inner(batch[0])), batch[1]) + 0.0 * torch.rand(())

    def configure_optimizers(self) -> Any:
        return sgd(self)


def everything(module: pl.LightningModule) -> Any:
    """What a measurement by hand must leave alone."""
    links = [id(m._trainer) for m in module.modules() if isinstance(m, pl.LightningModule)]
    modes = [m.training for m in module.modules()]
    addresses = [p.data_ptr() for p in (*module.parameters(), *module.buffers())]
    return {
        "state": module_state(module),
        "random": random_states(),
        "more": frozen([links, modes, addresses, str(module.device)]),
    }
