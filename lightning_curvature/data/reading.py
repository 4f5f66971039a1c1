"""This rank's share of a loader's samples: by index where the loader has indices, else in the loader's order."""

import itertools
import math
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.data import sized_len
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.data import extract_batch_size, warning_cache
from torch.utils.data import BatchSampler, DistributedSampler

from lightning_curvature.data import samplers
from lightning_curvature.data.copies import DataRandomness, mixed
from lightning_curvature.replay.batches import copied


@dataclass(frozen=True)
class ProbeBatch:
    """A batch as the loader hands it out, before Lightning moves it to the device.

    Attributes:
        batch: the collated samples; in :meth:`Reading.shares` their indices.
        size: number of samples in it, or its weight relative to other batches.
        seed: seed of the batch hooks (see :func:`~.data.probe_set.to_device`).
        group: number of the group of batches to which it belongs.
        spread: number of groups of which several ranks hold batches; None where each group lies on one rank.
    """

    batch: Any
    size: int
    seed: int
    group: int = 0
    spread: int | None = None


@dataclass(frozen=True)
class Reading:
    """One reading of a loader by this rank, under the rules of :mod:`~lightning_curvature.data`.

    Attributes not listed are the arguments of :func:`~.data.probe_set.read_probe_set`.

    Attributes:
        loader: a fresh copy of the loader, which the reading uses up.
        of_trainer: whether it is the Trainer's loader, which is sharded over ranks.
        shaped: gives a batch the form of the Trainer's batches.
        randomness: the generators of the loader, already seeded.
    """

    trainer: pl.Trainer
    loader: Any
    of_trainer: bool
    shaped: Callable[[Any], Any]
    randomness: DataRandomness
    seed: int
    samples: int | None
    batch_size: int | None
    group_size: int

    @property
    def size(self) -> int:
        """Return the size of a batch, where torch cuts the batches."""
        return self.batch_size or self.loader.batch_sampler.batch_size

    def check_sizes(self, **sizes: int | None) -> None:
        """Raise unless the loader can cut batches of the given sizes."""
        for name, value in sizes.items():
            if value is not None and not samplers.cuts_batches(self.loader):
                raise MisconfigurationException(
                    f"{name} must be left to a dataloader that hands out whole batches, got {value}: leave it out."
                )

    def indices(self) -> Sequence[int] | None:
        """Return the indices of the training samples in the dataset; None where batches are read in order."""
        sampler = samplers.sampler_of(self.loader)
        sharded = isinstance(sampler, DistributedSampler)
        if not samplers.cuts_batches(self.loader) or samplers.is_iterable(self.loader):
            return None
        if self.of_trainer and self.trainer.world_size > 1 and not sharded and type(sampler) not in samplers.WHOLE:
            return None  # Trainer(use_distributed_sampler=False): the sampler gives this rank's samples
        indices = samplers.indices_of(samplers.source_sampler(self.loader))
        seen = self._epoch_batches() * self.loader.batch_sampler.batch_size * (sampler.num_replicas if sharded else 1)
        return indices if indices is None or seen >= len(indices) else indices[: int(seen)]

    def _epoch_batches(self) -> float:
        """Return how many batches training ever sees on a rank: infinity where each epoch has different ones."""
        if self.of_trainer and (samplers.is_ordered(self.loader) or self.trainer.overfit_batches > 0):  # type: ignore[attr-defined]
            return self.trainer.num_training_batches
        return math.inf

    def chosen(self, indices: Sequence[int]) -> Sequence[int]:
        """Return ``samples`` of the indices in ascending order, without a last batch that training would drop."""
        if self.samples is not None and len(indices) > self.samples:
            # torch.randperm would take memory for all indices of the dataset.
            indices = sorted(random.Random(self.seed).sample(indices, self.samples))
        if self.loader.drop_last and len(indices) > self.size:
            indices = indices[: len(indices) // self.size * self.size]  # the model may require full batches
        return indices

    def by_index(self, indices: Sequence[int]) -> Iterator[ProbeBatch]:
        """Yield this rank's batches of the samples with these indices, in their order."""
        for share in self.shares(indices):
            rows = [self.sample(index) for index in share.batch]
            # A copy, because the samples may be the dataset's memory.
            yield replace(share, batch=self.shaped(copied(self.loader.collate_fn(rows))))

    def shares(self, indices: Sequence[int]) -> Iterator[ProbeBatch]:
        """Yield this rank's batches with the indices of their samples in place of data.

        Rank r of W takes every W-th group from the r-th on; every W-th batch where there are fewer groups than ranks;
        every W-th sample where there are fewer batches than ranks. Batches are the same on any number of ranks.
        """
        rank, ranks, size = self.trainer.global_rank, self.trainer.world_size, self.size
        batches = [indices[start : start + size] for start in range(0, len(indices), size)]
        groups = math.ceil(len(batches) / self.group_size)
        spread = groups if groups < ranks else None
        for number, batch in enumerate(batches):
            group = number // self.group_size
            if len(batches) < ranks:
                batch = batch[(rank - number * size) % ranks :: ranks]
            elif (group if spread is None else number) % ranks != rank:
                continue
            if batch:
                yield ProbeBatch(batch, len(batch), mixed(self.seed, batch[0], 1), group, spread)

    def sample(self, index: int) -> Any:
        """Return one sample, read alone: its augmentation must not depend on the ranks or on the size of a batch."""
        self.randomness.seed(self.seed, index)
        dataset = self.loader.dataset
        return dataset.__getitems__([index])[0] if getattr(dataset, "__getitems__", None) else dataset[index]

    def in_order(self) -> Iterator[ProbeBatch]:
        """Yield this rank's batches as the loader gives them."""
        rank, ranks = self.trainer.global_rank, self.trainer.world_size
        loader, sampler, limit = self.loader, samplers.sampler_of(self.loader), self._epoch_batches()
        if self.samples is None and limit == math.inf and sized_len(loader) is None:
            raise MisconfigurationException(
                "samples must be a number where the dataloader has no length, got None: say how many to measure on."
            )
        self.check_sizes(batch_size=self.batch_size)
        if self.batch_size is not None:
            limit *= loader.batch_sampler.batch_size / self.batch_size
            cut = BatchSampler(sampler, self.batch_size, loader.drop_last)
            vars(loader).update(batch_size=self.batch_size, batch_sampler=cut)  # the loader forbids setting attributes
        batches: Iterator[Any] = iter(loader)
        if isinstance(sampler, DistributedSampler):
            if loader.batch_sampler is None:
                # The sampler repeats its first batches so that all ranks have the same number.
                distinct = range(sampler.rank, len(sampler.dataset), ranks)  # type: ignore[arg-type]
                batches = itertools.islice(batches, len(distinct))
        elif not self.of_trainer and not samplers.is_iterable(loader):
            batches = itertools.islice(batches, rank, None, ranks)
        batches = itertools.islice(batches, None if limit == math.inf else math.ceil(limit))
        wanted = math.inf if self.samples is None else math.ceil(self.samples / ranks)
        for position, batch in enumerate(batches):
            size, seed = sample_count(batch), mixed(self.seed, position, rank, 1)
            # A copy, because the batch may be the dataset's memory.
            yield ProbeBatch(self.shaped(copied(batch)), size, seed, position // self.group_size)
            wanted -= size
            if wanted <= 0:
                return


def sample_count(batch: Any) -> int:
    """Return the number of samples in a batch as Lightning counts them, and leave its warning to the run.

    Of a batch of graphs their number; Lightning takes that of their nodes.
    """
    if hasattr(batch, "to_data_list") and isinstance(graphs := getattr(batch, "num_graphs", None), int):
        return graphs
    given = set(warning_cache)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return extract_batch_size(batch)
    except (MisconfigurationException, RecursionError) as error:
        raise MisconfigurationException(
            f"a batch must show how many samples it holds by a tensor in it, got a {type(batch).__name__} without: "
            "give probe_dataloader= a DataLoader with a batch_size."
        ) from error
    finally:
        warning_cache.intersection_update(given)
