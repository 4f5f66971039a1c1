"""The probe set: the training samples on which the same Hessian is measured at every step."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils._pytree import tree_unflatten
from torch.utils.data import BatchSampler

from lightning_curvature.data.copies import DataRandomness, fresh_copy
from lightning_curvature.data.loaders import leaves
from lightning_curvature.data.position import Bookmark, Position, position_of
from lightning_curvature.data.reading import ProbeBatch, Reading
from lightning_curvature.distributed.together import together
from lightning_curvature.replay.batches import copied

__all__ = ["ProbeBatch", "ProbeSet", "read_probe_set", "step_size", "to_device"]

Result = TypeVar("Result")
Share = tuple[Iterable[ProbeBatch], Callable[["ProbeSet"], Result]]


@dataclass(frozen=True)
class ProbeSet:
    """The batches of this rank, and the size of the whole.

    Attributes:
        total: number of samples over all ranks.
        rounds: largest number of batches on a rank.
        count: number of batches over all ranks.
    """

    batches: tuple[ProbeBatch, ...]
    total: int
    rounds: int
    count: int
    spread: int | None = None

    def groups(self) -> list[int]:
        """Return the group of each batch; the last one is repeated until the list has ``rounds`` entries."""
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
    bookmark: Bookmark | None = None,
) -> ProbeSet:
    """Return the probe set of a run, under the rules of :mod:`~lightning_curvature.data`.

    The samples of an indexed loader are cut into batches of ``batch_size``, and these into groups of ``group_size``.
    :meth:`~.data.reading.Reading.shares` says which of them go to which rank. On each rank about ``total`` / W ·
    (bytes of one collated sample) stay in memory.

    Args:
        trainer: the Trainer, from ``on_train_start`` on (before, it has no dataloader).
        dataloader: a DataLoader, or batches that can be iterated repeatedly; default: the Trainer's.
        samples: the largest number of samples, over all ranks; None for all.
        batch_size: size of a batch; default: that of the loader. Whole batches cannot be cut.
        group_size: number of consecutive batches in a group; a group lies on one rank where there is one for each rank.
        seed: seed of the choice of samples and of random augmentations.
        failure: this rank's error before the reading, with which it reads nothing, or None.
        bookmark: where the loader stood at the first reading of the run; is set by the first.

    Raises:
        Exception: ``failure``.
        ValueError: ``samples`` or ``batch_size`` is less than 1.
        MisconfigurationException: there is more than one loader, or it cannot be copied, has no end or no samples.
        RuntimeError: another rank failed before or during the reading.
    """
    check_numbers(trainer, samples, batch_size=batch_size)

    def read(reading: Reading) -> Share[ProbeSet]:
        indices = reading.indices()
        batches = reading.in_order() if indices is None else reading.by_index(reading.chosen(indices))
        return batches, lambda share: share

    return read_together(trainer, dataloader, read, failure, bookmark, seed, samples, batch_size, group_size)


def check_numbers(trainer: pl.Trainer, samples: int | None, **sizes: int | None) -> None:
    """Raise unless all numbers are at least 1, and ``samples`` at least the number of ranks."""
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
    read: Callable[[Reading], Share[Result]],
    failure: Exception | None,
    bookmark: Bookmark | None,
    seed: int,
    samples: int | None,
    batch_size: int | None = None,
    group_size: int = 1,
) -> Result:
    """Read this rank's share of a fresh copy of the loader and return what ``read`` makes of it. One collective.

    A second one shares positions, where a loader has any to be kept in ``bookmark``.

    ``read`` returns this rank's batches, and a function that turns them into the result once all ranks have read. All
    other arguments and the errors are those of :func:`read_probe_set`.
    """
    batches: list[ProbeBatch] = []
    finish: list[Callable[[ProbeSet], Result]] = []
    bookmark, position = bookmark or Bookmark(), Position()
    empty = torch.zeros(trainer.world_size, 3, dtype=torch.float64, device="cpu")

    def make() -> dict[str, Tensor]:
        if failure is not None:
            raise failure
        of_trainer = dataloader is None
        loader, shaped = _only_loader(trainer.train_dataloader if of_trainer else dataloader, nested=of_trainer)
        fresh = fresh_copy(loader)
        randomness = DataRandomness(trainer.strategy.root_device, fresh)
        with randomness.kept():
            if fresh is not loader:  # a sequence has no position
                bookmark.go_to(trainer, fresh)
                position.update(position_of(fresh))
            randomness.seed(seed)
            reading = Reading(trainer, fresh, of_trainer, shaped, randomness, seed, samples, batch_size, group_size)
            share, result = read(reading)
            batches.extend(share)  # a generator reads here
        finish.append(result)
        table = torch.zeros_like(empty)
        table[trainer.global_rank] = torch.tensor([sum(one.size for one in batches), len(batches), len(position)])
        return {"counts": table}

    table = together(trainer, make, {"counts": empty}, "reading the probe set")["counts"]
    sizes, counts, numbers = table.round().long().T.tolist()
    if any(numbers) and bookmark.positions is None:
        bookmark.set(trainer, position)
    if min(sizes) == 0:
        raise MisconfigurationException(
            "the probe set must hold at least one sample for each rank, got "
            f"{' + '.join(map(str, sizes))}: give more data, or other data by probe_dataloader=."
        )
    return finish[0](ProbeSet(tuple(batches), sum(sizes), max(counts), sum(counts), batches[0].spread))


def to_device(trainer: pl.Trainer, module: pl.LightningModule, probe: ProbeBatch) -> Any:
    """Return a batch as ``training_step`` receives it: converted and moved by the Trainer, with all hooks.

    The hooks get a copy. They draw the same random numbers (augmentation on the device) in every call, and the random
    states are the same afterwards. The caller restores the state of the module that hooks change.
    """
    randomness = DataRandomness(trainer.strategy.root_device)
    with randomness.kept():
        randomness.seed(probe.seed)
        return moved(trainer, module, copied(probe.batch))


def moved(trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> Any:
    """Return a batch converted and moved by the Trainer, with all hooks, which draw and write as they do."""
    batch = trainer.precision_plugin.convert_input(batch)
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


def _only_loader(loaders: Any, nested: bool) -> tuple[Any, Callable[[Any], Any]]:
    """Return the loader in a collection, and a function that gives its batches the form of the collection."""
    flat, form = leaves(loaders, nested)
    if len(flat) != 1:
        raise MisconfigurationException(
            f"the probe set must come from one dataloader, got a {form.type.__name__} of {len(flat)}: give "
            "probe_dataloader= batches of the form that training_step takes, such as a list of some of them."
        )
    if flat[0] is None:
        raise MisconfigurationException(
            "the Trainer must have set up its train dataloader before the probe set is read, got None: read in "
            "on_train_start or later, or give probe_dataloader=."
        )
    return flat[0], lambda batch: tree_unflatten([batch], form)
