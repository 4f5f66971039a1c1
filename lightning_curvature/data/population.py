"""The samples of the probe set as a population, and mini-batches drawn from it as training draws them."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import RandomSampler, WeightedRandomSampler

from lightning_curvature.data.copies import DataRandomness, mixed
from lightning_curvature.data.position import Bookmark
from lightning_curvature.data.probe_set import ProbeBatch, ProbeSet, Share, check_numbers, read_together, step_size
from lightning_curvature.data.reading import Reading
from lightning_curvature.data.samplers import cuts_batches, source_sampler
from lightning_curvature.replay.batches import copied

# The last number in the keys of seeds: for the choice of samples, batch hooks, a collate_fn. A probe set's end in 1.
_CHOICE, _HOOKS, _COLLATION = 2, 3, 4


@dataclass(frozen=True, eq=False)
class Population:
    """Samples, or batches of the loader, from which mini-batches are drawn independently.

    Two draws are two independent mini-batches of training, which may share samples. So the mean over draws has the
    standard error of independent ones, and E[g_Bᵀ H_B' g_B] = E[g_Bᵀ H g_B] with H of the whole population.

    Attributes:
        total: number of samples over all ranks.
        share: this rank's micro-batches of the whole population.
        members: batches of the loader, or indices of samples.
        collated: gives a micro-batch its data in place of indices.
        batch_size: samples of a mini-batch, or None where it consists of batches of any sizes.
        own_batches: number of this rank's batches in a mini-batch; None where samples are drawn, the same on each rank.
        micro_batch_size: samples of a micro-batch, where samples are drawn.
        replacement: whether a mini-batch may hold a sample twice.
        weights: relative probabilities of the samples, or None.
    """

    total: int
    seed: int
    share: ProbeSet
    members: Sequence[Any]
    collated: Callable[[ProbeBatch], ProbeBatch]
    batch_size: int | None
    own_batches: int | None = None
    micro_batch_size: int = 1
    replacement: bool = False
    weights: Tensor | None = None

    @property
    def weighted(self) -> bool:
        """Whether some samples are drawn more often than others."""
        return self.weights is not None and bool((self.weights != self.weights[0]).any())

    def whole(self) -> ProbeSet:
        """Return this rank's share of the population, cut as by :func:`~.data.probe_set.read_probe_set`."""
        return replace(self.share, batches=tuple(map(self.collated, self.share.batches)))

    def draw(self, key: int, number: int) -> tuple[ProbeBatch, ...]:
        """Return the micro-batches of mini-batch ``number`` of measurement ``key``, for example a step's number."""
        batches = self._drawn(mixed(self.seed, key, number, _CHOICE))
        if self.own_batches is None:
            size = self.micro_batch_size
            chunks = [batches[start : start + size] for start in range(0, len(batches), size)]
            batches = [ProbeBatch(chunk, len(chunk), seed=0) for chunk in chunks]
        return tuple(
            self.collated(replace(one, seed=mixed(self.seed, key, number, index, _HOOKS), group=0))
            for index, one in enumerate(batches)
        )

    def _drawn(self, seed: int) -> Sequence[Any]:
        count = self.own_batches or self.batch_size
        assert count is not None
        if self.weights is None:
            # torch.randperm would take time for all samples.
            draw = random.Random(seed).choices if self.replacement else random.Random(seed).sample
            return draw(self.members, k=count)
        generator = torch.Generator("cpu").manual_seed(seed)
        drawn = torch.multinomial(self.weights, count, self.replacement, generator=generator)
        return [self.members[position] for position in drawn.tolist()]


def read_population(
    trainer: pl.Trainer,
    dataloader: Any | None = None,
    *,
    samples: int | None,
    batch_size: int | None = None,
    micro_batch_size: int | None = None,
    seed: int = 0,
    failure: Exception | None = None,
    bookmark: Bookmark | None = None,
) -> Population:
    """Return the samples of a run as a population, under the rules of :mod:`~lightning_curvature.data`.

    Drawing leaves random states as they were, as reading does.

    *An indexed loader*: a mini-batch is ``batch_size`` of the samples, collated by the loader's ``collate_fn`` in
    micro-batches of ``micro_batch_size``, of which the last may be smaller. It is drawn

    * uniformly without replacement, as the mini-batches of a shuffled epoch are, for any sampler but these:
    * with replacement for ``RandomSampler(replacement=True)``, where the Trainer keeps it (not on several ranks);
    * by the weights of a ``WeightedRandomSampler``, with replacement or, without, like the first batch of an epoch.

    Every rank reads all n samples, keeps them in memory, and draws the same mini-batch ``number`` of measurement
    ``key``, on any number of ranks. A sample has one random augmentation, the same in all mini-batches; ``collate_fn``
    draws anew in each micro-batch. Batches are collated on demand: each call of ``whole`` collates n / W samples.

    *Any other loader*: each rank keeps the batches that it has read, and a mini-batch consists of as many of them as
    make up a step, drawn without replacement. All batches have equal weight, in a mini-batch (as in a step) and in the
    whole. Ranks hold, and so draw, different batches; a pair of mini-batches has the curvature of this rank's batches.
    A draw copies nothing: its data is that of ``whole``. Where torch cuts the batches (an iterable dataset with a
    ``batch_size``), an incomplete last batch is left out, and the size of a batch is the largest divisor of the
    mini-batch's size that is at most ``micro_batch_size``. Whole batches stay as they are; both sizes must be left out.

    The other arguments and the errors are those of :func:`~.data.probe_set.read_probe_set`; ``seed`` also seeds the
    draws. The default of ``batch_size`` is the data of an optimizer step as it is now (batch size of the Trainer's
    loader · ``accumulate_grad_batches`` · ranks), or all samples where training has fewer; it is one batch of a given
    ``dataloader`` where the Trainer's has no size, or where the given one hands out whole batches. The default of
    ``micro_batch_size`` is the batch size of the loader. A MisconfigurationException also says that a mini-batch is
    larger than the population, or that a size is given for whole batches.

    Example:
        >>> loader = torch.utils.data.DataLoader(range(100), batch_size=4)
        >>> trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
        >>> population = read_population(trainer, loader, samples=None, batch_size=6)
        >>> [micro_batch.size for micro_batch in population.draw(key=0, number=0)]
        [4, 2]
        >>> population.total, len(population.whole().batches)
        (100, 25)
    """
    check_numbers(trainer, samples, batch_size=batch_size, micro_batch_size=micro_batch_size)

    def read(reading: Reading) -> Share[Population]:
        step = trainer.accumulate_grad_batches * trainer.world_size if reading.of_trainer else 1
        if not cuts_batches(reading.loader):
            reading.check_sizes(batch_size=batch_size, micro_batch_size=micro_batch_size)
            return _read_batches(reading, step, None)
        size = batch_size or step_size(trainer) or reading.loader.batch_sampler.batch_size * step
        indices = reading.indices()
        if indices is not None:
            return _read_samples(reading, indices, size, by_step=batch_size is None)
        micro_batch = max(number for number in range(1, min(reading.size, size) + 1) if size % number == 0)
        return _read_batches(replace(reading, batch_size=micro_batch), size // micro_batch, size)

    return read_together(trainer, dataloader, read, failure, bookmark, seed, samples, micro_batch_size)


def _read_samples(reading: Reading, every: Sequence[int], size: int, by_step: bool) -> Share[Population]:
    sampler, indices = source_sampler(reading.loader), reading.chosen(every)
    replacement = type(sampler) in (RandomSampler, WeightedRandomSampler) and sampler.replacement
    weights = sampler.weights.cpu()[list(indices)] if type(sampler) is WeightedRandomSampler else None
    if by_step and not replacement and (reading.samples is None or len(every) <= reading.samples):
        size = min(size, len(indices))  # an epoch is no longer
    if not replacement and 0 < len(indices) < size:
        raise MisconfigurationException(
            f"batch_size must be at most the {len(indices)} samples that are drawn from without replacement, got "
            f"{size}{' (an optimizer step)' if by_step else ''}: lower it, or raise probe_samples."
        )
    # Copies, because the samples may be the dataset's memory.
    rows = {index: copied(reading.sample(index)) for index in indices}
    collate, shaped, device = reading.loader.collate_fn, reading.shaped, reading.trainer.strategy.root_device

    def collated(probe: ProbeBatch) -> ProbeBatch:
        randomness = DataRandomness(device, collate)
        with randomness.kept():
            randomness.seed(probe.seed, _COLLATION)
            # ``collate`` may write into the samples, also into one that is drawn twice, and reuse the batch's memory.
            batch = copied(collate([copied(rows[index]) for index in probe.batch]))
        return replace(probe, batch=shaped(batch))

    def finish(share: ProbeSet) -> Population:
        sizes = {"batch_size": size, "micro_batch_size": reading.size}
        return Population(
            share.total, reading.seed, share, indices, collated, **sizes, replacement=replacement, weights=weights
        )

    return reading.shares(indices), finish


def _read_batches(reading: Reading, count: int, size: int | None) -> Share[Population]:
    batches = list(reading.in_order())
    if size is not None and len(batches) > 1 and batches[-1].size < batches[0].size:
        batches.pop()  # the incomplete one at the end of an epoch
    if 0 < len(batches) < count:
        raise MisconfigurationException(
            f"each rank must hold at least the {count} batches that make up a mini-batch, got {len(batches)}: raise "
            "probe_samples, or give batches of the size of a mini-batch by probe_dataloader=."
        )
    if any(one.size != reading.batch_size for one in batches):
        size = None

    def finish(share: ProbeSet) -> Population:
        equal = tuple(replace(one, size=1) for one in share.batches)  # as Lightning averages those of a step
        whole = replace(share, batches=equal, total=share.count)
        return Population(share.total, reading.seed, whole, equal, lambda one: one, size, own_batches=count)

    return batches, finish
