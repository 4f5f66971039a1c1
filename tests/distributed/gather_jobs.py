"""Losses of the outputs of all ranks, under DDP: each rank has the loss of the whole batch."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather

from tests.distributed.cases import Case
from tests.helpers.runs import Batch, Classifier, mlp


def contrastive(z: Tensor) -> Tensor:
    """Of each sample and its neighbour in the batch; with a penalty, which keeps its curvature positive."""
    return F.cross_entropy(z[::2] @ z[1::2].T, torch.arange(len(z) // 2)) + z.square().mean()


def descent(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.02)


class Gathering(Classifier):
    def __init__(self, of_lightning: bool) -> None:
        super().__init__(mlp(4, 6, 3), descent)
        self.of_lightning = of_lightning

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        z = self(batch[0])
        if dist.is_initialized():
            # The default of torch's function is the group of the first import.
            parts = self.all_gather(z, sync_grads=True) if self.of_lightning else all_gather(z, dist.group.WORLD)
            z = torch.cat(tuple(parts))
        loss = contrastive(z)
        self.log("train_loss", loss)
        return loss


DIFFERENCES = ("kl", "finite_difference")
lightning = Case(partial(Gathering, True), estimators=("hvp", *DIFFERENCES, "critical"))
functional = replace(lightning, module=partial(Gathering, False))
# gᵀd of the gradient that was kept, and of the outputs.
pair = replace(lightning, estimators=DIFFERENCES, monitor={"epsilon": "auto"})
alone = replace(pair, estimators=("kl",))
forward_mode = replace(lightning, estimators=("gauss_newton", "hvp"))

JOBS = [name for name, value in list(globals().items()) if isinstance(value, Case)]
