"""Read a user's data without moving it: fresh copies of loaders; random generators seeded, then put back."""

import contextlib
import copy
import functools
import hashlib
import random
import sys
from collections.abc import Generator, Iterable, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_curvature.operators.differentiation import put_back_at_exit
from lightning_curvature.replay import objects
from lightning_curvature.replay.randomness import RandomState

# A transform inside RandomApply inside Compose inside a Subset's dataset is eight steps away, each container being one.
_DEPTH = 10
# A longer container holds data, not transforms or datasets.
_DATA_LENGTH = 256
# A copy of a loader reads without worker processes and their options.
_IN_PROCESS: dict[str, Any] = {
    "num_workers": 0,
    "prefetch_factor": None,
    "persistent_workers": False,
    "worker_init_fn": None,
    "timeout": 0,
    "pin_memory": False,
    "_iterator": None,
}
# Attributes that torch's loaders have; any other is of the user's class.
OPTIONS = frozenset(vars(DataLoader(range(1))) | _IN_PROCESS)  # type: ignore[arg-type]


class DataRandomness:
    """Every random-number generator that reading data may draw from, and the attributes of what is read.

    Python's, numpy's and torch's own (see :class:`~.replay.randomness.RandomState`) and those within reach of the
    given objects: in attributes, containers and closures, transforms among them. A dataset or ``collate_fn`` that
    counts its calls, or remembers what it has read, is put back too.

    Args:
        device: the device that the module trains on.
        roots: datasets, samplers and functions that are read or called.
    """

    def __init__(self, device: torch.device, *roots: object) -> None:
        self._device = device
        self._generators: list[Any] = []
        self._holders: list[Any] = []
        objects.walk(roots, self._visit, {})

    def _visit(self, value: Any, level: int) -> Iterable[Any]:
        container = isinstance(value, (*objects.CONTAINERS, tuple, frozenset))
        if not container and objects.generator_state(value) is not None:
            self._generators.append(value)
            return ()
        data = len(value) > _DATA_LENGTH if container else isinstance(value, Tensor)
        if data or not objects.opens(value, objects.STANDARD):
            return ()
        self._holders.append(value)
        return objects.parts(value) if level < _DEPTH else ()

    @contextlib.contextmanager
    def kept(self) -> Generator[None, None, None]:
        """Set all of them back as they are now, also after an error."""
        restorers: list[objects.Restore] = [RandomState(self._device).restore]
        for holder in (*self._generators, *self._holders):
            restorers += objects.contents(holder)
        with contextlib.ExitStack() as stack:
            put_back_at_exit(stack, functools.partial(objects.put_back, restorers))
            yield

    def seed(self, *key: int) -> None:
        """Set all of them to states that follow from the key."""
        value = mixed(*key)
        random.seed(value)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(value)
        # Not torch.manual_seed, which seeds all devices: of these only one is put back.
        torch.default_generator.manual_seed(value)
        if self._device.type != "cpu":
            getattr(torch, self._device.type).manual_seed(value)
        for generator in self._generators:
            if isinstance(generator, torch.Generator):
                generator.manual_seed(value)
            elif hasattr(generator, "bit_generator"):
                generator.bit_generator.state = type(generator.bit_generator)(value).state
            else:
                generator.seed(value)


def mixed(*key: int) -> int:
    """Return a seed of 32 bits, as numpy takes it; keys that differ by one have unrelated seeds."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=4).digest(), "little")


def fresh_copy(loader: Any) -> Any:
    """Return a loader that yields the batches from the start, in this process; the given loader is only read.

    Samplers and iterable datasets are copied with their present state; the data of a map-style dataset is shared. A
    sequence of batches is returned itself.

    Raises:
        MisconfigurationException: for loaders that cannot be copied.
    """
    if isinstance(loader, Sequence):
        return loader
    # The memo makes samplers refer to the dataset that is read, instead of copying it with them.
    memo: dict[int, Any] = {}
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
        memo[id(loader.dataset)] = _sheltered(loader.dataset)
    try:
        if not isinstance(loader, DataLoader):
            return copy.deepcopy(loader)
        names = ("dataset", "sampler", "batch_sampler", "generator")
        copies = copy.deepcopy([getattr(loader, name) for name in names], memo)
    except Exception as error:
        raise MisconfigurationException(
            "the dataloader must be one that can be copied, so that reading from it does not move the run's own, got "
            f"{type(loader).__name__} ({type(error).__name__}: {error}): give probe_dataloader= a list of batches or a "
            "DataLoader over a map-style dataset."
        ) from error
    fresh = copy.copy(loader)
    # The loader forbids to set some of these by name once it is made.
    fresh.__dict__.update(_IN_PROCESS | dict(zip(names, copies, strict=True)))
    for sampler in (fresh.sampler, fresh.batch_sampler, getattr(fresh.batch_sampler, "sampler", None)):
        if callable(set_epoch := getattr(sampler, "set_epoch", None)):
            set_epoch(0)
    return fresh


def _sheltered(dataset: Any) -> Any:
    """Return a copy of a dataset, and of datasets inside it, that shares all data but no count or open file.

    Worker processes start from the dataset of this process: if reading opened a file there, they would share its
    position.
    """
    try:
        copied = copy.copy(dataset)
        for name, value in list(getattr(copied, "__dict__", {}).items()):
            if isinstance(value, Dataset):
                copied.__dict__[name] = _sheltered(value)
            elif isinstance(value, (list, tuple)) and value and isinstance(value[0], Dataset):
                copied.__dict__[name] = [_sheltered(one) for one in value]
    except Exception:  # an object that refuses to be copied
        return dataset
    return copied
