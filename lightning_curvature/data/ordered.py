"""Single samples in a fixed order, so that the first k of them are one nested set for every k."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_curvature.data.position import Bookmark
from lightning_curvature.data.probe_set import ProbeBatch, ProbeSet, Share, read_together
from lightning_curvature.data.reading import Reading
from lightning_curvature.data.samplers import cuts_batches


@dataclass(frozen=True, eq=False)
class OrderedSamples:
    """Samples 0, 1, 2, …, of which each of W ranks holds every W-th as a batch of one.

    Attributes:
        own: this rank's samples by their numbers, ascending.
        total: number of samples over all ranks.
    """

    own: dict[int, ProbeBatch]
    total: int

    def among(self, numbers: Sequence[int]) -> list[int]:
        """Return those of the numbers that this rank holds."""
        return [number for number in numbers if number in self.own]


def read_ordered_samples(
    trainer: pl.Trainer,
    dataloader: Any | None = None,
    *,
    samples: int,
    seed: int = 0,
    failure: Exception | None = None,
    bookmark: Bookmark | None = None,
) -> OrderedSamples:
    """Return single samples of a run in a fixed order, under the rules of :mod:`~lightning_curvature.data`.

    Samples of a map-style dataset are drawn without replacement, in an order that follows from ``seed`` and the size of
    the dataset alone, for any number of samples and of ranks. Samples of an iterable dataset come as its loader gives
    them, those of several ranks in turn. Each sample is collated alone, as a batch of one.

    The arguments and errors are those of :func:`~.data.probe_set.read_probe_set`. A MisconfigurationException also says
    that there are fewer than ``samples`` samples, or that the loader hands out whole batches.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> loader = DataLoader(range(100), batch_size=32)
        >>> trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
        >>> ordered = read_ordered_samples(trainer, loader, samples=5)
        >>> [int(sample.batch) for sample in ordered.own.values()]
        [49, 98, 55, 8, 37]
    """

    def read(reading: Reading) -> Share[OrderedSamples]:
        if not cuts_batches(reading.loader):
            raise MisconfigurationException(
                f"the dataloader must make batches of single samples, got a {type(reading.loader).__name__} that hands "
                "out whole ones: give probe_dataloader= one with a batch_size."
            )
        indices = reading.indices()
        if indices is None:
            rank, ranks = trainer.global_rank, trainer.world_size
            numbered = (replace(one, group=one.group * ranks + rank) for one in reading.in_order())
            # The last rank may read one sample more than it needs.
            return (one for one in numbered if one.group < samples), finish
        order = first_of_shuffle(len(indices), min(samples, len(indices)), seed)
        return reading.by_index([indices[position] for position in order]), finish

    def finish(share: ProbeSet) -> OrderedSamples:
        if share.total < samples:
            raise MisconfigurationException(
                f"sample_sizes must leave a sample to be added, got {samples} samples for the largest and its "
                f"candidates where the data has {share.total}: lower sample_sizes or candidates."
            )
        return OrderedSamples({one.group: one for one in share.batches}, share.total)

    return read_together(trainer, dataloader, read, failure, bookmark, seed, samples, batch_size=1)


def first_of_shuffle(total: int, count: int, seed: int) -> list[int]:
    """Return the first numbers of a shuffle of 0, 1, …, n − 1 (Fisher and Yates), without memory for all n."""
    draw, moved, first = random.Random(seed), dict[int, int](), list[int]()
    for place in range(count):
        other = draw.randrange(place, total)
        first.append(moved.get(other, other))
        moved[other] = moved.get(place, place)
    return first
