"""Reading a user's data without moving it: fresh copies of loaders; random generators seeded, then put back."""

import contextlib
import copy
import functools
import hashlib
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_curvature.replay.module_state import RandomState, generator_state

# A transform inside RandomApply inside Compose inside a Subset's dataset is eight steps away, each container being one.
_DEPTH = 10
# A longer container holds data, not transforms or parts of a dataset.
_DATA_LENGTH = 256
# Objects of these have no generator of a user inside (random.Random and numpy's are recognized before).
_CLOSED = {"numpy"} | sys.stdlib_module_names
_LEAVES = (type(None), str, bytes, int, float, Tensor, type, types.ModuleType, pl.Trainer)
# What a copy of a loader reads without: worker processes, and what is only for them.
_IN_PROCESS: dict[str, Any] = {
    "num_workers": 0,
    "prefetch_factor": None,
    "persistent_workers": False,
    "worker_init_fn": None,
    "timeout": 0,
    "pin_memory": False,
    "_iterator": None,
}


class DataRandomness:
    """Every random-number generator that reading data may draw from, and the attributes of what is read.

    Python's, numpy's and torch's own (see ``RandomState``) and those found in the given objects: in
    attributes, containers and closures, transforms among them. A dataset or ``collate_fn`` that counts its calls, or
    remembers what it has read, is put back too.

    Args:
        device: the device that the module trains on.
        roots: what is read: datasets, samplers, functions.
    """

    def __init__(self, device: torch.device, *roots: object) -> None:
        self._device = device
        self._own, self._holders = _found(roots)

    @contextlib.contextmanager
    def kept(self) -> Generator[None, None, None]:
        """Set all of them back as they are now, also after an error."""
        with contextlib.ExitStack() as stack:
            stack.callback(RandomState(self._device).restore)
            for one in self._own:
                restore = generator_state(one)
                assert restore is not None
                stack.callback(restore)
            for holder in self._holders:
                stack.callback(_content(holder))
            yield

    def seed(self, *key: int) -> None:
        """Set all of them to what follows from the key."""
        value = mixed(*key)
        random.seed(value)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(value)
        # Not torch.manual_seed, which seeds all devices: of these only one is put back.
        torch.default_generator.manual_seed(value)
        if self._device.type != "cpu":
            getattr(torch, self._device.type).manual_seed(value)
        for one in self._own:
            _seed(one, value)


def _found(roots: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Return the generators within a few steps of the given objects, whichever way is the shortest, and what holds."""
    found: list[Any] = []
    holders: list[Any] = []
    seen: set[int] = set()
    level = list(roots)
    for _ in range(_DEPTH + 1):
        following: list[Any] = []
        for value in level:
            if id(value) in seen or isinstance(value, _LEAVES):
                continue
            seen.add(id(value))
            if generator_state(value) is not None:
                found.append(value)
            else:
                parts = _parts(value)
                following += parts
                if isinstance(value, (list, set, deque, dict)) and len(value) <= _DATA_LENGTH:
                    holders.append(value)
                elif parts and isinstance(getattr(value, "__dict__", None), dict):
                    holders.append(vars(value))
        level = following
    return found, holders


def _content(holder: Any) -> Callable[[], None]:
    """Return what gives a container, or the attributes of an object, the elements that they have now."""
    before = copy.copy(holder)

    def restore() -> None:
        if isinstance(holder, dict):
            same = len(holder) == len(before) and all(holder.get(key) is value for key, value in before.items())
        elif isinstance(holder, set):
            same = holder == before
        else:
            same = len(holder) == len(before) and all(a is b for a, b in zip(holder, before, strict=True))
        if not same:
            holder.clear()
            holder.extend(before) if isinstance(holder, (list, deque)) else holder.update(before)

    return restore


def _parts(value: Any) -> Sequence[Any]:
    """Return what an object consists of, as far as its own generators may be in there."""
    if isinstance(value, (list, tuple, set, frozenset, deque, dict)):
        elements = value.values() if isinstance(value, dict) else value
        return list(elements) if len(value) <= _DATA_LENGTH else ()
    if isinstance(value, functools.partial):
        return value.func, value.args, value.keywords
    if isinstance(value, types.MethodType):
        return value.__self__, value.__func__
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        return *cells, value.__defaults__, value.__kwdefaults__
    if type(value).__module__.partition(".")[0] in _CLOSED and not isinstance(value, types.SimpleNamespace):
        return ()
    return list(getattr(value, "__dict__", {}).values())


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _seed(generator: Any, value: int) -> None:
    if isinstance(generator, torch.Generator):
        generator.manual_seed(value)
    elif hasattr(generator, "bit_generator"):
        generator.bit_generator.state = type(generator.bit_generator)(value).state
    else:
        generator.seed(value)


def mixed(*key: int) -> int:
    """Return a seed of 32 bits, which is what numpy takes; keys that differ by one have unrelated seeds."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=4).digest(), "little")


def fresh_copy(loader: Any) -> Any:
    """Return what gives the batches of a loader from the start, in this process, and leaves the loader as it is.

    Samplers and iterable datasets are copied with the state that they have; of a map-style dataset the data is shared.
    A sequence of batches is its own copy.

    Raises:
        MisconfigurationException: for what cannot be copied.
    """
    if isinstance(loader, Sequence):
        return loader
    try:
        if not isinstance(loader, DataLoader):
            return copy.deepcopy(loader)
        # The memo makes samplers refer to the dataset that is read, instead of copying it with them.
        memo: dict[int, Any] = {}
        if not isinstance(loader.dataset, IterableDataset):
            memo[id(loader.dataset)] = _sheltered(loader.dataset)
        names = ("dataset", "sampler", "batch_sampler", "generator")
        parts = copy.deepcopy([getattr(loader, name) for name in names], memo)
    except Exception as error:
        raise MisconfigurationException(
            "the dataloader must be one that can be copied, so that reading from it does not move the run's own, got "
            f"{type(loader).__name__} ({type(error).__name__}: {error}): give probe_dataloader= a list of batches or a "
            "DataLoader over a map-style dataset."
        ) from error
    fresh = copy.copy(loader)
    # The loader forbids to set some of these by name once it is made.
    fresh.__dict__.update(_IN_PROCESS | dict(zip(names, parts, strict=True)))
    for sampler in (fresh.sampler, fresh.batch_sampler, getattr(fresh.batch_sampler, "sampler", None)):
        if callable(set_epoch := getattr(sampler, "set_epoch", None)):
            set_epoch(0)
    return fresh


def _sheltered(dataset: Any) -> Any:
    """Return a copy of a dataset, and of datasets inside it, that shares all data.

    What it counts or remembers while it is read stays in the copy. Worker processes start from the dataset of this
    process: a file that is opened on first use must stay closed in there, or they would share its position.
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
