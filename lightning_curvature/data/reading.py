"""One rank's share of the samples of a loader: by their indices where the loader has such, else in its order."""

import itertools
import math
import operator
import random
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.data import sized_len
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.data import extract_batch_size, warning_cache
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_curvature.data.copies import DataRandomness, mixed
from lightning_curvature.replay.batches import copied

# Samplers that give each sample of their dataset, on every rank, when nobody has made them distributed.
_WHOLE = (SequentialSampler, RandomSampler)


@dataclass(frozen=True)
class ProbeBatch:
    """A batch as the loader hands it out, before Lightning moves it to the device.

    Attributes:
        batch: the collated samples.
        size: how many samples are in it, or how much it counts beside others.
        seed: of what the batch hooks draw (see :func:`~.data.probe_set.to_device`).
        group: number of the group of batches that it belongs to.
        spread: whether other ranks hold batches of that group, too.
    """

    batch: Any
    size: int
    seed: int
    group: int = 0
    spread: bool = False


@dataclass(frozen=True)
class Reading:
    """One reading of a probe set, as :func:`~.data.probe_set.read_probe_set` describes it.

    Args:
        trainer: its ranks, and how much of an epoch it takes.
        loader: a fresh copy of the loader: it is used up.
        own: whether the loader is the Trainer's, which has shared it out over the ranks.
        samples: the most samples to take, over all ranks; None for all.
        batch_size: size of a batch; None for that of the loader.
        group_size: how many consecutive batches make a group.
        seed: of the draw of samples and of the random augmentations in them.
        randomness: the generators of the loader.
    """

    trainer: pl.Trainer
    loader: Any
    own: bool
    samples: int | None
    batch_size: int | None
    group_size: int
    seed: int
    randomness: DataRandomness

    def batches(self) -> Iterator[ProbeBatch]:
        """Read this rank's share."""
        self.randomness.seed(self.seed)
        indices = self.indices()
        return self.in_order() if indices is None else self.by_index(self.chosen(indices))

    @property
    def _sampler(self) -> Any:
        batch_sampler = getattr(self.loader, "batch_sampler", None)
        return getattr(self.loader if batch_sampler is None else batch_sampler, "sampler", None)

    @property
    def _iterable(self) -> bool:
        return isinstance(getattr(self.loader, "dataset", None), IterableDataset)

    @property
    def source_sampler(self) -> Any:
        """The sampler that says which samples there are, inside of one that shares them out over ranks."""
        sampler = self._sampler
        # Lightning shows another sampler to its distributed one as if it were a dataset.
        inner = getattr(sampler.dataset, "_sampler", None) if isinstance(sampler, DistributedSampler) else None
        return sampler if inner is None else inner

    @property
    def cuts_batches(self) -> bool:
        """Whether torch makes the batches of single samples."""
        kind = type(self.loader)
        return (
            isinstance(self.loader, DataLoader)
            and type(self.loader.batch_sampler) is BatchSampler
            and (kind.__iter__, kind._get_iterator) == (DataLoader.__iter__, DataLoader._get_iterator)
        )

    def _epoch_batches(self) -> float:
        """How many batches of a rank training sees at all: those of one epoch, unless the next epoch has others."""
        ordered = not isinstance(self.loader, DataLoader) or self._iterable or _is_sequential(self._sampler)
        if self.own and (ordered or self.trainer.overfit_batches > 0):  # type: ignore[attr-defined]
            return self.trainer.num_training_batches
        return math.inf

    def indices(self) -> Sequence[int] | None:
        """Indices of the training samples in the dataset, or None where batches are taken as they come."""
        sampler = self._sampler
        if not self.cuts_batches or self._iterable:
            return None
        if isinstance(sampler, DistributedSampler):
            inner = self.source_sampler
            indices = _length_range(sampler.dataset) if inner is sampler else _one_epoch(inner)
        elif self.own and self.trainer.world_size > 1 and type(sampler) not in _WHOLE:
            return None  # Trainer(use_distributed_sampler=False): what it gives is this rank's
        else:
            indices = _one_epoch(sampler)
        shards = sampler.num_replicas if isinstance(sampler, DistributedSampler) else 1
        seen = self._epoch_batches() * self.loader.batch_sampler.batch_size * shards
        return indices if indices is None or seen >= len(indices) else indices[: int(seen)]

    def chosen(self, indices: Sequence[int]) -> Sequence[int]:
        """Those of the indices that are in the set."""
        if self.samples is not None and len(indices) > self.samples:
            # Not torch.randperm, which takes memory for all indices of the dataset.
            drawn = random.Random(self.seed).sample(range(len(indices)), self.samples)
            indices = [indices[position] for position in sorted(drawn)]
        size = self._size
        if self.loader.drop_last and len(indices) > size:
            indices = indices[: len(indices) // size * size]  # the model may not be made for the rest
        return indices

    def by_index(self, indices: Sequence[int]) -> Iterator[ProbeBatch]:
        """Read this rank's share of the samples with these indices, in their order."""
        for share in self.shares(indices):
            rows = [self.sample(index) for index in share.batch]
            # A copy, as the samples may be the dataset's own tensors.
            yield replace(share, batch=copied(self.loader.collate_fn(rows)))

    def shares(self, indices: Sequence[int]) -> Iterator[ProbeBatch]:
        """Batches of this rank, with the indices of their samples in place of these."""
        for group, spread, chunk in self._share(indices):
            yield ProbeBatch(chunk, len(chunk), mixed(self.seed, chunk[0], 1), group, spread)

    @property
    def _size(self) -> int:
        return self.batch_size or self.loader.batch_sampler.batch_size

    def _share(self, indices: Sequence[int]) -> Iterator[tuple[int, bool, Sequence[int]]]:
        """Batches of this rank: number of the group, whether other ranks share it, indices.

        They are cut before they are dealt out, so that they are the same on any number of ranks.
        """
        rank, ranks, of_group = self.trainer.global_rank, self.trainer.world_size, self.group_size
        size = self._size
        chunks = [indices[start : start + size] for start in range(0, len(indices), size)]
        groups = math.ceil(len(chunks) / of_group)
        if groups >= ranks:
            for group in range(rank, groups, ranks):
                for chunk in chunks[group * of_group : (group + 1) * of_group]:
                    yield group, False, chunk
        elif len(chunks) >= ranks:
            for number in range(rank, len(chunks), ranks):
                yield number // of_group, True, chunks[number]
        else:
            # Fewer batches than ranks: each is cut once more.
            for number, chunk in enumerate(chunks):
                own = chunk[(rank - number * size) % ranks :: ranks]
                if own:
                    yield number // of_group, True, own

    def sample(self, index: int) -> Any:
        """Read one sample by itself: its augmentation must not depend on the ranks and the size of a batch."""
        self.randomness.seed(self.seed, index)
        dataset = self.loader.dataset
        return dataset.__getitems__([index])[0] if getattr(dataset, "__getitems__", None) else dataset[index]

    def in_order(self) -> Iterator[ProbeBatch]:
        """Batches of this rank as the loader gives them."""
        loader, sampler, rank, ranks = self.loader, self._sampler, self.trainer.global_rank, self.trainer.world_size
        limit = self._epoch_batches()
        if self.samples is None and limit == math.inf and sized_len(loader) is None:
            raise MisconfigurationException(
                "samples must be a number where the dataloader has no length, got None: say how many to measure on."
            )
        if self.batch_size is not None:
            limit *= self._set_batch_size(self.batch_size)
        batches: Iterable[Any] = loader
        if isinstance(sampler, DistributedSampler):
            if loader.batch_sampler is None:
                # What comes after these repeats the first ones, to give all ranks as many.
                batches = itertools.islice(loader, len(_length_range(sampler.dataset)[sampler.rank :: ranks]))
        elif not self.own and not self._iterable:
            batches = itertools.islice(loader, rank, None, ranks)
        if limit != math.inf:
            batches = itertools.islice(batches, math.ceil(limit))
        wanted = math.inf if self.samples is None else math.ceil(self.samples / ranks)
        for position, batch in enumerate(batches):
            # A copy, as whole batches are the dataset's own tensors.
            group = position // self.group_size
            probe = ProbeBatch(copied(batch), sample_count(batch), mixed(self.seed, position, rank, 1), group)
            yield probe
            wanted -= probe.size
            if wanted <= 0:
                return

    def _set_batch_size(self, batch_size: int) -> float:
        """Make the loader cut batches of that size; return by what factor there are more of them."""
        if not self.cuts_batches:
            raise MisconfigurationException(
                f"batch_size must be left to a dataloader that hands out whole batches, got {batch_size}: leave it out."
            )
        sampler = BatchSampler(self._sampler, batch_size, self.loader.drop_last)
        factor = self.loader.batch_sampler.batch_size / batch_size
        self.loader.__dict__.update(batch_size=batch_size, batch_sampler=sampler)
        return float(factor)


def _is_sequential(sampler: Any) -> bool:
    if isinstance(sampler, DistributedSampler):
        return not sampler.shuffle and not hasattr(sampler.dataset, "_sampler")
    return type(sampler) is SequentialSampler


def _length_range(dataset: Any) -> range:
    return range(len(dataset))


def _one_epoch(sampler: Any) -> Sequence[int] | None:
    """Indices of the samples that a sampler draws from, in ascending order; None for one without an end."""
    if type(sampler) in _WHOLE:
        return _length_range(sampler.data_source)
    if type(sampler) is SubsetRandomSampler:
        return sorted(int(index) for index in sampler.indices)
    if type(sampler) is WeightedRandomSampler:
        return torch.nonzero(sampler.weights).flatten().tolist()
    length = sized_len(sampler)
    if length is None:
        return None
    try:
        return sorted({operator.index(index) for index in itertools.islice(sampler, length)})
    except TypeError:  # it draws something else than indices
        return None


def sample_count(batch: Any) -> int:
    """Return the number of samples in a batch as Lightning counts them, leaving its warning to the run itself."""
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
