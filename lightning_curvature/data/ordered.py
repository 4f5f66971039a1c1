"""Single samples in a fixed order, so that the first k of them are one nested set for every k."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_curvature.data.probe_set import ProbeBatch, Shape, read_together
from lightning_curvature.data.reading import Reading


@dataclass(frozen=True, eq=False)
class OrderedSamples:
    """Samples 0, 1, 2, …, of which each rank holds every W-th as a batch of its own.

    Attributes:
        own: this rank's samples by their numbers, ascending.
        total: number of samples over all ranks.
        ranks: W.
    """

    own: dict[int, ProbeBatch]
    total: int
    ranks: int

    def among(self, numbers: Sequence[int]) -> list[int]:
        """Those of the numbers that this rank holds."""
        return [number for number in numbers if number in self.own]

    def most(self, numbers: Sequence[int]) -> int:
        """How many of the numbers the rank with most of them holds."""
        return max(sum(number % self.ranks == rank for number in numbers) for rank in range(self.ranks))


def read_ordered_samples(
    trainer: pl.Trainer,
    dataloader: Any | None = None,
    *,
    samples: int,
    seed: int = 0,
    failure: Exception | None = None,
) -> OrderedSamples:
    """Read single samples of a run in an order of their own; the run does not notice.

    The samples are those of :func:`~.data.probe_set.read_probe_set`. Of a map-style dataset they are drawn without
    replacement, in an order that follows from ``seed`` and the size of the dataset alone, however many are taken and on
    any number of ranks; of an iterable one they come as its loader gives them, those of several ranks in turn. Each is
    collated by itself, as a batch of one.

    Args:
        trainer: the Trainer, from ``on_train_start`` on.
        dataloader: a DataLoader; default: the Trainer's.
        samples: how many, over all ranks.
        seed: of the order, and of random augmentations.
        failure: this rank's error before the reading: it then reads nothing, and the other ranks learn of it.

    Raises:
        Exception: ``failure``.
        MisconfigurationException: there are fewer samples, or the loader hands out whole batches.
        RuntimeError: on every rank when the reading failed on another one.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> loader = DataLoader(range(100), batch_size=32)
        >>> trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
        >>> found = read_ordered_samples(trainer, loader, samples=5)
        >>> [int(sample.batch) for sample in found.own.values()]
        [49, 98, 55, 8, 37]
    """

    def read(reading: Reading, shaped: Shape) -> tuple[Sequence[ProbeBatch], None]:
        if not reading.cuts_batches:
            raise MisconfigurationException(
                f"the dataloader must make batches of single samples, got a {type(reading.loader).__name__} that hands "
                "out whole ones: give probe_dataloader= one with a batch_size."
            )
        reading.randomness.seed(seed)
        indices = reading.indices()
        if indices is None:
            rank, ranks = trainer.global_rank, trainer.world_size
            found = [replace(one, group=one.group * ranks + rank) for one in reading.in_order()]
        else:
            chosen = first_of_shuffle(len(indices), min(samples, len(indices)), seed)
            found = list(reading.by_index([indices[position] for position in chosen]))
        # Of iterable datasets the last rank may have one more than it needs.
        return [replace(one, batch=shaped(one.batch)) for one in found if one.group < samples], None

    options = {"samples": samples, "batch_size": 1, "group_size": 1, "seed": seed}
    share, _ = read_together(trainer, dataloader, read, failure, **options)
    if share.total < samples:
        raise MisconfigurationException(
            f"sample_sizes must leave a sample to be added, got {samples} samples for the largest and its candidates "
            f"where the data has {share.total}: lower sample_sizes or candidates."
        )
    return OrderedSamples({one.group: one for one in share.batches}, share.total, trainer.world_size)


def first_of_shuffle(total: int, count: int, seed: int) -> list[int]:
    """The first numbers of a shuffle of 0, 1, …, n − 1 (Fisher and Yates), without the memory for all of it."""
    draw, moved, found = random.Random(seed), dict[int, int](), list[int]()
    for place in range(count):
        other = draw.randrange(place, total)
        found.append(moved.get(other, other))
        moved[other] = moved.get(place, place)
    return found
