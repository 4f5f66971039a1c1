"""Facts about a loader: its sampler, the indices of its samples, and whether torch makes its batches."""

import itertools
import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.utils.data as torch_data
from lightning.fabric.utilities.data import sized_len
from torch.utils.data import DataLoader, DistributedSampler

# Samplers that give the whole dataset on every rank unless they are made distributed.
WHOLE = (torch_data.SequentialSampler, torch_data.RandomSampler)


def is_iterable(loader: Any) -> bool:
    """Whether the loader reads an iterable dataset."""
    return isinstance(getattr(loader, "dataset", None), torch_data.IterableDataset)


def cuts_batches(loader: Any) -> bool:
    """Whether torch makes the loader's batches from single samples."""
    kind = type(loader)
    return (
        isinstance(loader, DataLoader)
        and type(loader.batch_sampler) is torch_data.BatchSampler
        and (kind.__iter__, kind._get_iterator) == (DataLoader.__iter__, DataLoader._get_iterator)
    )


def sampler_of(loader: Any) -> Any:
    """Return the sampler of single samples (of whole batches where the loader has no batch sampler), or None."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    return getattr(loader if batch_sampler is None else batch_sampler, "sampler", None)


def source_sampler(loader: Any) -> Any:
    """Return the sampler that decides which samples there are, from inside one that shards it over ranks."""
    sampler = sampler_of(loader)
    # Lightning passes a custom sampler to its distributed one in place of a dataset.
    inner = getattr(sampler.dataset, "_sampler", None) if isinstance(sampler, DistributedSampler) else None
    return sampler if inner is None else inner


def is_ordered(loader: Any) -> bool:
    """Whether every epoch gives the samples in the same order."""
    sampler = sampler_of(loader)
    if not isinstance(loader, DataLoader) or is_iterable(loader):
        return True
    if isinstance(sampler, DistributedSampler):
        return not sampler.shuffle and source_sampler(loader) is sampler
    return type(sampler) is torch_data.SequentialSampler


def indices_of(sampler: Any) -> Sequence[int] | None:
    """Return the indices that a sampler draws from, in ascending order; None where they have no end."""
    if isinstance(sampler, DistributedSampler):
        return range(len(sampler.dataset))  # type: ignore[arg-type]
    if type(sampler) in WHOLE:
        return range(len(sampler.data_source))
    if type(sampler) is torch_data.SubsetRandomSampler:
        return sorted(int(index) for index in sampler.indices)
    if type(sampler) is torch_data.WeightedRandomSampler:
        return torch.nonzero(sampler.weights).flatten().tolist()
    length = sized_len(sampler)
    if length is None:
        return None
    try:
        return sorted({operator.index(index) for index in itertools.islice(sampler, length)})
    except TypeError:  # it draws something other than indices
        return None
