"""Where a loader stood when the probe set was read, so that a resumed run reads the same samples."""

from collections.abc import Iterable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_curvature.data.copies import OPTIONS
from lightning_curvature.distributed.reduce import has_group
from lightning_curvature.replay import objects
from lightning_curvature.reporting.loggers import warn

# Numbers by their path within a loader, such as "sampler.epoch".
Position = dict[str, Any]

_NUMBERS = frozenset({bool, int, float, type(None)})
_LIBRARIES = frozenset({"torch", "lightning", "lightning_fabric", "pytorch_lightning"})
_DEPTH, _WIDTH = 6, 64  # a longer container of other objects holds data
_LONGEST = 2**17  # so does a longer list of numbers, where it is no order of samples


class Bookmark:
    """The positions of all ranks' loaders at the first reading in a run, which a checkpoint keeps.

    Attributes:
        positions: one for each rank; None before the first reading, and where no loader has one.
    """

    def __init__(self, positions: list[Position] | None = None) -> None:
        self.positions = positions

    def go_to(self, trainer: pl.Trainer, fresh: Any) -> None:
        """Move a copy of this rank's loader to where it stood then; parts that are no copies are put back later."""
        if self.positions is None:
            return
        if len(self.positions) != trainer.world_size:
            warn(
                f"the probe set was first read on {len(self.positions)} ranks, and is read again on "
                f"{trainer.world_size} from a loader that chooses its samples itself: they may be others."
            )
            return
        saved = self.positions[trainer.global_rank]
        for path, owner, name, now in _numbers(fresh):
            if path in saved:
                value = saved[path]
                entries = owner if isinstance(owner, (dict, list)) else vars(owner)
                entries[name] = value.numpy() if isinstance(value, Tensor) and not isinstance(now, Tensor) else value

    def set(self, trainer: pl.Trainer, position: Position) -> None:
        """Keep the positions of all ranks, of which some are not empty. One collective on several ranks."""
        positions: list[Any] = [position] * trainer.world_size
        if trainer.world_size > 1:
            if not has_group():
                return
            dist.all_gather_object(positions, position)
        self.positions = positions


def position_of(fresh: Any) -> Position:
    """Return the numbers by which a fresh copy of a loader chooses what comes next.

    Counts of epochs, orders of samples and the like: attributes of the user's own loaders, samplers and iterable
    datasets, not the options of torch's. A map-style dataset has no position, and random generators are seeded before
    each reading.
    """
    return {
        path: torch.as_tensor(value).clone() if hasattr(value, "dtype") else value
        for path, _, _, value in _numbers(fresh)
    }


def _numbers(
    holder: Any, path: str = "", level: int = 0, seen: set[int] | None = None
) -> Iterator[tuple[str, Any, Any, Any]]:
    """Yield path, owner, name and value of all numbers within reach, and of lists of them."""
    seen = set() if seen is None else seen
    if id(holder) in seen:
        return
    seen.add(id(holder))
    for name, value in _entries(holder):
        below = f"{path}.{name}" if path else str(name)
        if not _is_number(value):
            if level < _DEPTH:
                yield from _numbers(value, below, level + 1, seen)
        elif not (isinstance(holder, DataLoader) and name in OPTIONS) and not _is_fixed(holder):
            yield below, holder, name, value


def _is_fixed(holder: Any) -> bool:
    """Whether an object cannot be written, or has no attributes but options of the libraries that made it."""
    return isinstance(holder, tuple) or type(holder).__module__.partition(".")[0] in _LIBRARIES


def _entries(holder: Any) -> Iterable[tuple[Any, Any]]:
    indexed = isinstance(holder, Dataset) and not isinstance(holder, IterableDataset)
    if indexed or isinstance(holder, (nn.Module, pl.Trainer, type)) or not objects.opens(holder, objects.STANDARD):
        return []
    if isinstance(holder, (dict, list, tuple)):
        pairs = holder.items() if isinstance(holder, dict) else enumerate(holder)
        return list(pairs) if len(holder) <= _WIDTH else []
    return list(getattr(holder, "__dict__", {}).items())


def _is_number(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return 0 < len(value) <= _LONGEST and _NUMBERS.issuperset(map(type, value))
    if isinstance(value, Tensor) or type(value).__module__ == "numpy":
        integers = not torch.as_tensor(value).is_floating_point() if hasattr(value, "dtype") else False
        return integers and value.ndim <= 1 and len(value.ravel()) <= _LONGEST
    return type(value) in _NUMBERS
