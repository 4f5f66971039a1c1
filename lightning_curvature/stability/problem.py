"""Inputs of one measurement of the stability index: both halves of the step's data, and where the path is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import lightning.pytorch as pl
import torch.utils.data as torch_data
from lightning.fabric.utilities.data import sized_len
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_curvature.data.reading import sample_count
from lightning_curvature.data.samplers import source_sampler
from lightning_curvature.losses.cut import cut_parts
from lightning_curvature.losses.fixed import ProbeLoss
from lightning_curvature.monitors.step_calls import StepCall
from lightning_curvature.operators.micro_batches import MicroBatch
from lightning_curvature.optimizers.mean_square import MeanSquareRule


@dataclass(frozen=True)
class Halves:
    """Both halves of the data of a step, on this rank.

    Attributes:
        parts: micro-batches of each half; their weights add up to 1 over the ranks.
        shares: shares of the halves in the step.
        whole: the one batch that was cut; None where the halves are whole batches.
    """

    parts: tuple[Sequence[MicroBatch], Sequence[MicroBatch]]
    shares: tuple[float, float]
    whole: MicroBatch | None = None


@dataclass(frozen=True)
class StabilityProblem:
    """Inputs of one measurement.

    Attributes:
        halves: of the step's data.
        displacement: θ minus its average, this rank's part of each parameter.
        rule: of the optimizer.
        kept: 1 − b/N, the share of the variance that is left where a step takes b of N samples, each once an epoch.
        sharded: whether ranks hold parts of the parameters.
    """

    trainer: pl.Trainer
    loss: ProbeLoss
    parameters: Sequence[Tensor]
    halves: Halves
    displacement: Sequence[Tensor]
    rule: MeanSquareRule
    kept: float
    sharded: bool


def halves_of(loss: ProbeLoss, calls: Sequence[StepCall], world: int, rank: int, sharded: bool, seed: int) -> Halves:
    """Return the halves of the data of a step: of all its batches on all ranks, or of the only one.

    Args:
        loss: makes micro-batches.
        calls: this rank's batches of the step.
        world: number of ranks.
        rank: this rank's place among them.
        sharded: whether ranks share parameters: then all take part in each product, and each halves its own data.
        seed: of the random numbers of the second half, where one batch is cut: not those of the first.
    """
    ranks, rank, among = (1, 0, world) if sharded else (world, rank, 1)
    count = len(calls) * ranks
    if count > 1:
        first = count // 2
        parts = loss.parts_of_step(calls, 1)
        numbers = range(rank * len(calls), (rank + 1) * len(calls))
        one = [replace(part, weight=1 / first / among) for part, n in zip(parts, numbers, strict=True) if n < first]
        two = [
            replace(part, weight=1 / (count - first) / among)
            for part, n in zip(parts, numbers, strict=True)
            if n >= first
        ]
        return Halves((one, two), (first / count, 1.0 - first / count))
    ((batch, index, randomness),) = calls
    size = sample_count(batch)
    if size < 2:
        raise MisconfigurationException(
            "StabilityMonitor must see two samples or two batches in a step, got one sample: give batches of two or "
            "more, or accumulate them."
        )
    sizes = (size // 2, size - size // 2)
    halves = zip(cut_parts(batch, sizes), (randomness, loss.seeded(seed)), strict=True)
    first_half, second_half = (loss.parts_of_step([(half, index, state)], among) for half, state in halves)
    (whole,) = loss.parts_of_step(calls, among)
    return Halves((first_half, second_half), (sizes[0] / size, sizes[1] / size), whole)


def share_left(trainer: pl.Trainer, calls: int) -> float:
    """Return 1 − b/N of a step of so many of the loader's batches, each of which comes once an epoch.

    1 where it has no end, or where samples may come again within an epoch.
    """
    loader, length = trainer.train_dataloader, trainer.num_training_batches
    if trainer.limit_train_batches != 1.0 and not isinstance(loader, (Mapping, list, tuple)):
        length = sized_len(loader) or length  # an epoch of some batches, of all samples
    sampler = source_sampler(loader)
    again = isinstance(sampler, torch_data.WeightedRandomSampler) or getattr(sampler, "replacement", False)
    return 1.0 if again else max(1.0 - calls / length, 0.0)
