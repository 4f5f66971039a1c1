"""What is measured of the noise against the curvature, and on what."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import lightning.pytorch as pl
from torch import Tensor, nn

from lightning_curvature.data.probe_set import ProbeSet
from lightning_curvature.functional.noise import CHAIN
from lightning_curvature.losses.fixed import ProbeLoss

Quantity = Literal[
    "noise_gamma",
    "noise_gamma_awd",
    "noise_commutativity",
    "noise_alignment",
    "noise_spearman",
    "noise_coupling",
    "noise_awd_chain",
]
QUANTITIES: tuple[Quantity, ...] = Quantity.__args__  # type: ignore[attr-defined]
Route = Literal["kronecker", "general"]

# What tells which samples are alike: inputs (n, …) and labels (n,) of a batch.
Pairing = Callable[[Any], tuple[Tensor, Tensor]]

# Keys of each quantity.
KEYS: dict[str, tuple[str, ...]] = {
    "noise_gamma": ("noise_gamma", "noise_gamma_stderr"),
    "noise_gamma_awd": ("noise_gamma_awd", "noise_gamma_awd_stderr"),
    "noise_commutativity": ("noise_commutativity", "noise_commutativity_relative", "noise_commutativity_random"),
    "noise_alignment": ("noise_alignment",),
    "noise_spearman": ("noise_spearman",),
    "noise_coupling": ("noise_coupling", "noise_coupling_random", "noise_coupling_z"),
    "noise_awd_chain": tuple(f"noise_gamma_awd_{name}" for name in CHAIN),
}


@dataclass(frozen=True)
class NoiseOptions:
    """What is measured.

    Attributes:
        quantities: names.
        top: 𝒩, how many directions; None for 40 % of them.
        haar_draws: random rotations for the baseline of the coupling.
    """

    quantities: tuple[Quantity, ...]
    top: int | None
    haar_draws: int


@dataclass(frozen=True)
class Block:
    """A block of parameters whose noise is measured.

    Attributes:
        name: name of the parameter.
        parameter: the block, of D entries.
        layer: the linear layer whose weight it is, where all second-order statistics have Kronecker structure.
        batch_size: b, samples of an optimizer step.
        seed: of random rotations.
    """

    name: str
    parameter: Tensor
    layer: nn.Linear | None
    batch_size: int
    seed: int


@dataclass(frozen=True)
class NoiseProblem(Block):
    """A block, and on what it is measured.

    Attributes:
        trainer: the Trainer.
        loss: repeats the training step.
        probe_set: the samples.
        at_once: general route: whether samples are evaluated together.
        on_batch: called after every micro-batch.
        pairing: gives inputs and labels of a batch, where mini-batches are to be paired.
        unpaired: why they are not, though that was asked for.
    """

    trainer: pl.Trainer
    loss: ProbeLoss
    probe_set: ProbeSet
    at_once: bool
    on_batch: Callable[[], None]
    pairing: Pairing | None = None
    unpaired: str = ""
