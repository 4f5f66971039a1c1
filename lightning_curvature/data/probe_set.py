"""Which samples a probe set holds: the training samples on which the same Hessian is measured at every step."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader

from lightning_curvature.data.copies import DataRandomness, fresh_copy
from lightning_curvature.data.reading import ProbeBatch, Reading
from lightning_curvature.distributed.together import together
from lightning_curvature.replay.batches import copied

__all__ = ["ProbeBatch", "ProbeSet", "read_probe_set", "step_size", "to_device"]

Shape = Callable[[Any], Any]
Found = TypeVar("Found")


@dataclass(frozen=True)
class ProbeSet:
    """The batches of this rank, and the size of the whole.

    Attributes:
        batches: this rank's share.
        total: number of samples over all ranks.
        rounds: the largest number of batches that any rank has.
        count: number of batches over all ranks.
        spread: number of groups that ranks have batches of in common, or None where each group lies on one rank.
    """

    batches: tuple[ProbeBatch, ...]
    total: int
    rounds: int
    count: int
    spread: int | None = None

    def groups(self) -> list[int]:
        """Group of each batch, the last repeated up to as many as any rank has."""
        numbers = [batch.group for batch in self.batches]
        return numbers + numbers[-1:] * (self.rounds - len(numbers))


def read_probe_set(
    trainer: pl.Trainer,
    dataloader: Any | None = None,
    *,
    samples: int | None,
    batch_size: int | None = None,
    group_size: int = 1,
    seed: int = 0,
    failure: Exception | None = None,
) -> ProbeSet:
    """Read the probe set of a run, which does not notice.

    *A loader that makes batches of a map-style dataset's samples* (``DataLoader(dataset, batch_size=…)``): the set is
    all n training samples if n ≤ ``samples``, else ``samples`` of them drawn without replacement, cut into batches of
    ``batch_size``, and these into groups of ``group_size``. Rank r of W takes every W-th group from the r-th on, or
    every W-th batch where there are fewer groups than ranks; where there are fewer batches than ranks, each is cut once
    more. Training samples are

    * the dataset, whether it is shuffled or shared out over ranks;
    * of a ``SubsetRandomSampler`` its indices; of a ``WeightedRandomSampler`` those of positive weight, each once and
      all alike (the weights do not enter the Hessian); of another sampler those that it gives in one epoch;
    * where nothing is shuffled, no more than an epoch of the Trainer takes: ``limit_train_batches`` and
      ``overfit_batches`` (which stops the shuffling) restrict the set, and so does ``drop_last``.

    *Any other loader* (iterable datasets, whole batches with ``batch_size=None``, a batch sampler or a loader class of
    the user's): batches in the order in which a fresh copy of the loader gives them, until there are ``samples``; the
    last one is kept whole. Several ranks read what the loader of each gives until it has ``samples``/W; of a given
    ``dataloader``, the same on all ranks, each takes every W-th batch, unless it is sharded (a ``DistributedSampler``)
    or over an iterable dataset, which is taken to share itself out. So is, under
    ``Trainer(use_distributed_sampler=False)``, every sampler but torch's sequential and random ones.

    The data is read in this process. Random states are the same afterwards: Python's, numpy's, torch's, and those of
    generators held by the loader, its samplers, the dataset and its transforms. For the reading they are all set from
    ``seed``, and where there are indices from that of each sample, so that random augmentations are the same in each
    reading of the set, however many ranks share it. An iterable dataset, or a loader that is no DataLoader, is
    copied together with the data that it holds, and read from the position at which it is.

    The batches stay in memory: about ``total`` / W · (bytes of one collated sample) on each rank, on the CPU unless the
    dataset makes its samples elsewhere. Users copy before they compute: a training step may write into its batch.

    Args:
        trainer: the Trainer, from ``on_train_start`` on (before, it has no dataloader).
        dataloader: a DataLoader, or batches that can be iterated again and again; default: the Trainer's.
        samples: the most samples to take, over all ranks; None for all.
        batch_size: size of a batch; default: that of the loader. Whole batches cannot be cut.
        group_size: how many consecutive batches belong together; they go to one rank, if there are groups for all.
        seed: of the draw of samples and of the random augmentations in them.
        failure: this rank's error before the reading: it then reads nothing, and the other ranks learn of it.

    Raises:
        Exception: ``failure``.
        ValueError: ``samples`` or ``batch_size`` is less than 1.
        MisconfigurationException: there is more than one loader, or it cannot be copied, has no end or no samples.
        RuntimeError: on every rank when the reading failed on another one.
    """
    check_numbers(trainer, samples, batch_size=batch_size)

    def read(reading: Reading, shaped: Shape) -> tuple[list[ProbeBatch], None]:
        return [replace(one, batch=shaped(one.batch)) for one in reading.batches()], None

    return read_together(
        trainer,
        dataloader,
        read,
        failure,
        samples=samples,
        batch_size=batch_size,
        group_size=group_size,
        seed=seed,
    )[0]


def check_numbers(trainer: pl.Trainer, samples: int | None, **sizes: int | None) -> None:
    """Check how many samples shall be read, and the sizes of their batches.

    Raises:
        ValueError: one is less than 1.
        MisconfigurationException: there are fewer samples than ranks.
    """
    for name, value in {"samples": samples, **sizes}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}: give a larger number, or None.")
    if samples is not None and samples < trainer.world_size:
        raise MisconfigurationException(
            f"samples must be at least the number of ranks, {trainer.world_size}, so that each has one, got {samples}: "
            "raise it."
        )


def read_together(
    trainer: pl.Trainer,
    dataloader: Any | None,
    read: Callable[[Reading, Shape], tuple[Sequence[ProbeBatch], Found]],
    failure: Exception | None = None,
    **options: Any,
) -> tuple[ProbeSet, Found]:
    """Read on all ranks what ``read`` makes of a fresh copy of the loader; random states are the same afterwards.

    Args:
        trainer: the Trainer.
        dataloader: the loader; default: the Trainer's.
        read: gets the reading, and what gives a batch the form of the Trainer's; returns this rank's share, and more.
        failure: this rank's error before the reading.
        **options: of the reading: ``samples``, ``batch_size``, ``group_size``, ``seed``.

    Returns:
        What the ranks have together, and what else this one's ``read`` returned.

    Raises:
        MisconfigurationException: there is more than one loader, or it cannot be copied, or gives no samples; on every
            rank, also when it was another one's.
        RuntimeError: on every rank when the reading failed on another one.
    """
    batches: list[ProbeBatch] = []
    more: list[Found] = []
    empty = torch.zeros(trainer.world_size, 3, dtype=torch.float64, device="cpu")

    def make() -> dict[str, Tensor]:
        if failure is not None:
            raise failure
        own = dataloader is None
        loader, shaped = _only_loader(trainer.train_dataloader if own else dataloader, nested=own)
        fresh = fresh_copy(loader)
        randomness = DataRandomness(trainer.strategy.root_device, fresh)
        with randomness.kept():
            share, found = read(Reading(trainer, fresh, own, randomness=randomness, **options), shaped)
            # While random states are those of the reading: the share may be a generator.
            batches.extend(share)
        more.append(found)
        table = torch.zeros_like(empty)
        spread = max((one.group + 1 for one in batches if one.spread), default=0)
        table[trainer.global_rank] = torch.tensor([sum(one.size for one in batches), len(batches), spread])
        return {"counts": table}

    table = together(trainer, make, {"counts": empty}, "reading the probe set")["counts"]
    sizes, numbers, spreads = table.round().long().T.tolist()
    if min(sizes) == 0:
        raise MisconfigurationException(
            "the probe set must hold at least one sample for each rank, got "
            f"{' + '.join(map(str, sizes))}: give more data, or other data by probe_dataloader=."
        )
    share = ProbeSet(tuple(batches), sum(sizes), max(numbers), sum(numbers), max(spreads) or None)
    return share, more[0]


def to_device(trainer: pl.Trainer, module: pl.LightningModule, probe: ProbeBatch) -> Any:
    """Return a batch as ``training_step`` receives it: converted and moved as the Trainer does, by all hooks.

    The hooks get a copy. What they draw from the global generators (augmentation on the device) is the same in every
    call, and these are put back; state of the module that hooks change is the caller's to keep.

    Args:
        trainer: the Trainer.
        module: the module it trains.
        probe: the batch.
    """
    randomness = DataRandomness(trainer.strategy.root_device)
    with randomness.kept():
        randomness.seed(probe.seed)
        batch = trainer.precision_plugin.convert_input(copied(probe.batch))
        hook, datamodule = "on_before_batch_transfer", getattr(trainer, "datamodule", None)
        owner = datamodule if datamodule is not None and is_overridden(hook, datamodule) else module
        batch = owner.on_before_batch_transfer(batch, dataloader_idx=0)
        return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def step_size(trainer: pl.Trainer) -> int | None:
    """Return the samples of an optimizer step as it is now, over all ranks; None where the loader has no batch size."""
    try:
        loader, _ = _only_loader(trainer.train_dataloader, nested=True)
    except MisconfigurationException:  # none yet, or several
        return None
    size = getattr(loader, "batch_size", None)
    if size is None and type(getattr(loader, "batch_sampler", None)) is BatchSampler:
        size = loader.batch_sampler.batch_size
    return size * trainer.accumulate_grad_batches * trainer.world_size if isinstance(size, int) else None


def _only_loader(loaders: Any, nested: bool) -> tuple[Any, Shape]:
    """Return the one loader in a collection, and what puts its batches into a collection of that form."""
    if loaders is None:
        raise MisconfigurationException(
            "the Trainer must have set up its train dataloader before the probe set is read, got None: read in "
            "on_train_start or later, or give probe_dataloader=."
        )
    if isinstance(loaders, CombinedLoader):
        return _only_loader(loaders.iterables, nested=True)
    if isinstance(loaders, (list, tuple)):
        nested = nested or any(isinstance(one, DataLoader) for one in loaders)
    if not isinstance(loaders, Mapping) and not (nested and isinstance(loaders, (list, tuple))):
        return loaders, lambda batch: batch
    if len(loaders) != 1:
        raise MisconfigurationException(
            f"the probe set must come from one dataloader, got a {type(loaders).__name__} of {len(loaders)}: give "
            "probe_dataloader= batches of the form that training_step takes, such as a list of some of them."
        )
    if isinstance(loaders, Mapping):
        ((name, value),) = loaders.items()
        loader, inner = _only_loader(value, nested=True)
        return loader, lambda batch: {name: inner(batch)}
    loader, inner = _only_loader(loaders[0], nested=True)
    form = list if isinstance(loaders, list) else tuple
    return loader, lambda batch: form([inner(batch)])
