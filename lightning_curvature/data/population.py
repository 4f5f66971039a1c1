"""The samples of the probe set as a population, and mini-batches drawn from it as training draws them."""

import functools
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import RandomSampler, WeightedRandomSampler

from lightning_curvature.data.copies import DataRandomness, mixed
from lightning_curvature.data.probe_set import ProbeBatch, ProbeSet, Shape, check_numbers, read_together, step_size
from lightning_curvature.data.reading import Reading
from lightning_curvature.replay.batches import copied

__all__ = ["Population", "read_population"]

# Last part of the keys of seeds: which samples are drawn, what the batch hooks draw, what a collate_fn draws. Those of
# a probe set end in 1.
_CHOICE, _HOOKS, _COLLATION = 2, 3, 4


@dataclass(frozen=True, eq=False)
class Population(ABC):
    """Mini-batches are drawn from it, each independently of all others.

    Two draws are two mini-batches of training whose data has nothing to do with each other, and may share samples. So
    the mean over draws has the standard error of independent ones, and for two draws E[g_Bᵀ H_B' g_B] = E[g_Bᵀ H g_B]
    with H of all samples that are drawn from.

    Attributes:
        share: this rank's micro-batches of all samples; in them may be indices instead of data.
        batch_size: samples of a mini-batch, or None where batches of the loader's are drawn, which all count alike.
        replacement: whether a mini-batch may hold a sample twice.
        seed: of all draws.
    """

    share: ProbeSet
    batch_size: int | None
    replacement: bool
    seed: int

    @property
    def total(self) -> int:
        """Number of samples over all ranks."""
        return self.share.total

    @property
    def weighted(self) -> bool:
        """Whether some samples are drawn more often than others."""
        return False

    @property
    def own_batches(self) -> int | None:
        """How many of a rank's own batches a mini-batch has; None where it is the same on every rank."""
        return None

    @abstractmethod
    def whole(self) -> ProbeSet:
        """Return this rank's share of all samples, as :func:`~.data.probe_set.read_probe_set` shares them out."""

    @abstractmethod
    def draw(self, key: int, number: int) -> tuple[ProbeBatch, ...]:
        """Return the micro-batches of mini-batch ``number`` of measurement ``key``, such as the number of a step."""


def read_population(
    trainer: pl.Trainer,
    dataloader: Any | None = None,
    *,
    samples: int | None,
    batch_size: int | None = None,
    micro_batch_size: int | None = None,
    seed: int = 0,
    failure: Exception | None = None,
) -> Population:
    """Read the samples of :func:`~.data.probe_set.read_probe_set`, of which mini-batches can be drawn.

    Reading leaves the run as it was, and so does drawing: the random states of Python, numpy, torch and of generators
    that are held by the loader, its samplers, the dataset or ``collate_fn`` are the same afterwards. Data is read in
    this process.

    *A loader that makes batches of a map-style dataset's samples*: a mini-batch is ``batch_size`` of the samples,
    collated by the loader's ``collate_fn`` in micro-batches of ``micro_batch_size``, of which the last may be smaller.
    It is drawn

    * uniformly without replacement, as the mini-batches of a shuffled epoch are, whatever the sampler, but
    * of a ``RandomSampler(replacement=True)`` with replacement, where the Trainer has kept it (for several ranks, it
      replaces it by one without);
    * of a ``WeightedRandomSampler`` by its weights, with replacement or, without, like the first batch of an epoch.

    Every rank reads all n samples, and mini-batch ``number`` of measurement ``key`` is the same on each, and on any
    number of ranks. A sample has one random augmentation, the same in all mini-batches that it is in; what a
    ``collate_fn`` draws is drawn anew in each micro-batch. On each rank stay in memory n samples as the dataset makes
    them, on the CPU unless it makes them elsewhere. Batches are collated when they are asked for: each call of
    ``whole`` makes anew n / W samples of batches, which live as long as the caller holds them.

    *Any other loader* (see ``read_probe_set``): each rank keeps the batches that it has read, and a
    mini-batch consists of as many of them as make up a step, drawn without replacement; all count alike, as they do in
    a step, also in the whole. Ranks have different batches, and so different mini-batches of one ``number``; a pair of
    mini-batches has the curvature of this rank's batches, not of all. A draw copies nothing: its data is that of
    ``whole``. Where torch cuts the batches of single samples (an iterable dataset with a ``batch_size``), the last one
    is left out where it is incomplete, and they are cut to the largest part of a mini-batch that is no larger than
    ``micro_batch_size`` and makes it up exactly; whole batches stay as they are, and both sizes must be left out.

    Args:
        trainer: the Trainer, from ``on_train_start`` on.
        dataloader: a DataLoader, or batches that can be iterated again and again; default: the Trainer's.
        samples: the most samples to take, over all ranks; None for all.
        batch_size: samples of a mini-batch. Default: the data of an optimizer step as it is now (batch size of the
            Trainer's loader · ``accumulate_grad_batches`` · ranks), or all where training has no more; one batch of a
            given ``dataloader`` where the Trainer's has no size, or where the given one hands out whole batches.
        micro_batch_size: samples of a micro-batch; default: the batch size of the loader.
        seed: of the choice of samples, of random augmentations in them, and of the draws.
        failure: this rank's error before the reading: it then reads nothing, and the other ranks learn of it.

    Raises:
        Exception: ``failure``.
        ValueError: ``samples``, ``batch_size`` or ``micro_batch_size`` is less than 1.
        MisconfigurationException: a mini-batch is larger than the population, a size is given for whole batches, or the
            loader is none of which a probe set can be read.
        RuntimeError: on every rank when the reading failed on another one.

    Example:
        >>> loader = torch.utils.data.DataLoader(range(100), batch_size=4)
        >>> trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
        >>> population = read_population(trainer, loader, samples=None, batch_size=6)
        >>> [part.size for part in population.draw(key=0, number=0)]
        [4, 2]
        >>> population.total, len(population.whole().batches)
        (100, 25)
    """
    check_numbers(trainer, samples, batch_size=batch_size, micro_batch_size=micro_batch_size)

    def read(reading: Reading, shaped: Shape) -> tuple[Sequence[ProbeBatch], Callable[[ProbeSet], Population]]:
        group = trainer.accumulate_grad_batches * trainer.world_size if reading.own else 1
        size = batch_size
        if reading.cuts_batches and size is None:
            size = step_size(trainer) or reading.loader.batch_sampler.batch_size * group
        reading.randomness.seed(seed)
        indices = reading.indices()
        if indices is None:
            return _read_batches(reading, shaped, group, size)
        assert size is not None
        return _read_samples(reading, shaped, indices, size, own=batch_size is None)

    options = {"samples": samples, "batch_size": micro_batch_size, "group_size": 1, "seed": seed}
    share, population = read_together(trainer, dataloader, read, failure, **options)
    return population(share)


@dataclass(frozen=True, eq=False)
class _Samples(Population):
    """Samples that mini-batches are collated of.

    Attributes:
        indices: of the samples that are drawn from.
        rows: the samples by their indices.
        weights: relative probabilities of the samples, or None where they are alike.
        micro_batch_size: samples of a micro-batch.
        collate: makes a batch of samples.
        shaped: gives it the form of the Trainer's batches.
        device: the device that the module trains on.
    """

    indices: Sequence[int]
    rows: Mapping[int, Any]
    weights: Tensor | None
    micro_batch_size: int
    collate: Callable[[list[Any]], Any]
    shaped: Shape
    device: torch.device

    @property
    def weighted(self) -> bool:
        return self.weights is not None and bool((self.weights != self.weights[0]).any())

    def whole(self) -> ProbeSet:
        return replace(self.share, batches=tuple(map(self._collated, self.share.batches)))

    def draw(self, key: int, number: int) -> tuple[ProbeBatch, ...]:
        drawn = [self.indices[position] for position in self._positions(mixed(self.seed, key, number, _CHOICE))]
        chunks = [drawn[start : start + self.micro_batch_size] for start in range(0, len(drawn), self.micro_batch_size)]
        return tuple(
            self._collated(ProbeBatch(chunk, len(chunk), mixed(self.seed, key, number, index, _HOOKS)))
            for index, chunk in enumerate(chunks)
        )

    def _positions(self, seed: int) -> Sequence[int]:
        assert self.batch_size is not None
        if self.weights is not None:
            generator = torch.Generator("cpu").manual_seed(seed)
            return torch.multinomial(self.weights, self.batch_size, self.replacement, generator=generator).tolist()
        # Not torch.randperm, which takes time for all samples.
        draw = random.Random(seed).choices if self.replacement else random.Random(seed).sample
        return draw(range(len(self.indices)), k=self.batch_size)

    def _collated(self, probe: ProbeBatch) -> ProbeBatch:
        """Put the samples in place of their indices."""
        randomness = DataRandomness(self.device, self.collate)
        with randomness.kept():
            randomness.seed(probe.seed, _COLLATION)
            # Copies of each, as it may write into them, also into one of a sample drawn twice; what it returns may be
            # its own memory.
            batch = copied(self.collate([copied(self.rows[index]) for index in probe.batch]))
        return replace(probe, batch=self.shaped(batch))


def _read_samples(
    reading: Reading, shaped: Shape, every: Sequence[int], size: int, own: bool
) -> tuple[Sequence[ProbeBatch], Callable[[ProbeSet], Population]]:
    loader, sampler = reading.loader, reading.source_sampler
    indices = reading.chosen(every)
    replacement = type(sampler) in (RandomSampler, WeightedRandomSampler) and sampler.replacement
    weights = sampler.weights.cpu()[list(indices)] if type(sampler) is WeightedRandomSampler else None
    if own and not replacement and (reading.samples is None or len(every) <= reading.samples):
        size = min(size, len(indices))  # an epoch is no longer
    if not replacement and 0 < len(indices) < size:
        raise MisconfigurationException(
            f"batch_size must be at most the {len(indices)} samples that are drawn from without replacement, got "
            f"{size}{' (an optimizer step)' if own else ''}: lower it, or raise probe_samples."
        )
    # Copies: the samples may be the dataset's own memory.
    rows = {index: copied(reading.sample(index)) for index in indices}
    return tuple(reading.shares(indices)), functools.partial(
        _Samples,
        batch_size=size,
        replacement=replacement,
        seed=reading.seed,
        indices=indices,
        rows=rows,
        weights=weights,
        micro_batch_size=reading.batch_size or loader.batch_sampler.batch_size,
        collate=loader.collate_fn,
        shaped=shaped,
        device=reading.trainer.strategy.root_device,
    )


@dataclass(frozen=True, eq=False)
class _Batches(Population):
    """Batches as a loader gives them.

    They count alike, as Lightning averages those of a step, whatever their sizes are.

    Attributes:
        group: how many make a mini-batch.
    """

    group: int

    def whole(self) -> ProbeSet:
        return replace(self.share, batches=self._alike, total=self.share.count)

    @property
    def own_batches(self) -> int:
        return self.group

    @property
    def _alike(self) -> tuple[ProbeBatch, ...]:
        return tuple(replace(one, size=1) for one in self.share.batches)

    def draw(self, key: int, number: int) -> tuple[ProbeBatch, ...]:
        chosen = random.Random(mixed(self.seed, key, number, _CHOICE)).sample(self._alike, self.group)
        return tuple(
            replace(one, seed=mixed(self.seed, key, number, index, _HOOKS), group=0) for index, one in enumerate(chosen)
        )


def _read_batches(
    reading: Reading, shaped: Shape, group: int, size: int | None
) -> tuple[Sequence[ProbeBatch], Callable[[ProbeSet], Population]]:
    part = None
    if reading.cuts_batches:
        assert size is not None
        most = min(reading.batch_size or reading.loader.batch_sampler.batch_size, size)
        part = max(number for number in range(1, most + 1) if size % number == 0)
        reading, group = replace(reading, batch_size=part), size // part
    else:
        for name, value in (("batch_size", size), ("micro_batch_size", reading.batch_size)):
            if value is not None:
                raise MisconfigurationException(
                    f"{name} must be left to a dataloader that hands out whole batches, got {value}: leave it out."
                )
    batches = [replace(one, batch=shaped(one.batch)) for one in reading.in_order()]
    if part is not None and len(batches) > 1 and batches[-1].size < batches[0].size:
        batches.pop()  # the incomplete one at the end of an epoch
    if 0 < len(batches) < group:
        raise MisconfigurationException(
            f"each rank must hold at least the {group} batches that make up a mini-batch, got {len(batches)}: raise "
            "probe_samples, or give batches of the size of a mini-batch by probe_dataloader=."
        )
    if any(one.size != part for one in batches):
        size = None
    return batches, functools.partial(_Batches, batch_size=size, replacement=False, seed=reading.seed, group=group)
