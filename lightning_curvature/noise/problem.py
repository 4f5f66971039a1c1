"""Inputs of one measurement of the noise covariance."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_curvature.data.probe_set import ProbeSet
from lightning_curvature.losses.fixed import ProbeLoss
from lightning_curvature.losses.samples import BlockSamples
from lightning_curvature.noise.options import Pairing

Route = Literal["kronecker", "general"]
ON_ANOTHER_RANK = "it cannot take the Kronecker route on another rank"


@dataclass(frozen=True)
class NoiseProblem:
    """Inputs of one measurement of the noise covariance.

    Attributes:
        parameter: the block, of D entries.
        device: device of the sums over samples.
        batch_size: b, samples of an optimizer step.
        batched: whether ``torch.vmap`` can follow the step; on the general route, differentiated twice.
        on_batch: called after every micro-batch.
        layer: the linear layer whose weight the block is, on the Kronecker route; None on the general route.
        why_general: why the block cannot take the Kronecker route; empty if it can.
        pairing: returns inputs and labels of a batch whose samples are to be paired; None if they are not.
        why_unpaired: why they are not, though that was asked for.
    """

    trainer: pl.Trainer
    loss: ProbeLoss
    probe_set: ProbeSet
    parameter: Tensor
    device: torch.device
    batch_size: int
    batched: bool
    on_batch: Callable[[], None]
    layer: nn.Linear | None
    why_general: str
    pairing: Pairing | None
    why_unpaired: str

    @property
    def route(self) -> Route:
        """Route to C and H."""
        return "general" if self.layer is None else "kronecker"

    def general(self, why: str) -> "NoiseProblem":
        """Return the same inputs for the general route, on which samples are not paired."""
        first = BlockSamples(self.loss, self.probe_set.batches[0])
        batched = self.batched and first.graphs_can_be_batched(self.parameter)
        return replace(self, batched=batched, layer=None, why_general=why, pairing=None, why_unpaired="")

    def as_all_ranks_can(self, capacities: Mapping[str, float]) -> "NoiseProblem":
        """Return the same inputs for the route that all ranks can take, paired if all ranks can pair."""
        if not capacities["kronecker"]:
            return self.general(self.why_general or ON_ANOTHER_RANK)
        if capacities["paired"]:
            return self
        why = self.why_unpaired or "batches of another rank cannot be paired."
        return replace(self, pairing=None, why_unpaired=why)
