"""A batch cut into its samples, each a batch of one, or into parts of several."""

import copy
import dataclasses
import itertools
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor

from lightning_curvature.replay.calls import rebuilt

# What all parts share: None, or what each has of it.
_Parts = Sequence[Any] | None


def cut_samples(batch: Any, size: int) -> list[Any]:
    """Return the samples of a batch.

    Each has one row of every tensor with ``size`` rows, one item of every list of ``size`` items of one form that have
    not so many rows themselves (images of several sizes), what its own ``to_data_list`` and ``from_data_list`` make of
    a batch of graphs, and all else. Lists, tuples, dicts and their kin, and dataclasses are looked into.

    Raises:
        ValueError: if nothing can be cut, or a member holds tensors of which nobody knows how.
    """
    return cut_parts(batch, [1] * size)


def cut_parts(batch: Any, sizes: Sequence[int]) -> list[Any]:
    """Return parts of a batch of so many samples each, cut as :func:`cut_samples` cuts it."""
    parts = _cut(batch, sizes)
    if parts is None:
        raise ValueError(f"a batch must hold a tensor with a row for each of its {sum(sizes)} samples, got none")
    return list(parts)


def _cut(value: Any, sizes: Sequence[int]) -> _Parts:
    size = sum(sizes)
    if isinstance(value, Tensor):
        return value.split(list(sizes)) if value.ndim and len(value) == size else None
    if hasattr(value, "to_data_list") and hasattr(type(value), "from_data_list"):
        samples = value.to_data_list()
        return [type(value).from_data_list(some) for some in _runs(samples, sizes)] if len(samples) == size else None
    if isinstance(value, (list, tuple)):
        inside = [_cut(one, sizes) for one in value]
        # A pair of inputs and targets is no batch of two.
        if len(value) == size and _are_alike(value) and None in inside:
            return [_like(value, list(some)) for some in _runs(value, sizes)]
        return _together(inside, value, lambda items: _like(value, items), len(sizes))
    if isinstance(value, Mapping):
        inside = [_cut(one, sizes) for one in value.values()]
        return _together(inside, value.values(), lambda items: _mapping(value, items), len(sizes))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        members = [getattr(value, name) for name in names]
        inside = [_cut(one, sizes) for one in members]
        return _together(inside, members, lambda items: _fields(value, names, items), len(sizes))
    if _holds_tensors(value):
        raise ValueError(
            f"a batch must be cut into its samples, got a {type(value).__name__} that holds tensors: make batches of "
            "tensors, lists, dicts and dataclasses, or give it to_data_list and from_data_list"
        )
    return None


def _runs(items: Sequence[Any], sizes: Sequence[int]) -> list[Sequence[Any]]:
    """Return runs of items, of so many each."""
    ends = list(itertools.accumulate(sizes))
    return [items[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def _are_alike(items: Sequence[Any]) -> bool:
    """Return whether items may be the samples of a batch: of one type and form, and holding tensors."""

    def form(item: Any) -> Any:
        if isinstance(item, Tensor):
            return item.ndim, item.dtype
        return type(item), tuple(item) if isinstance(item, Mapping) else None

    return len({form(item) for item in items}) == 1 and _holds_tensors(items)


def _together(inside: list[_Parts], members: Iterable[Any], make: Any, count: int) -> _Parts:
    """Return what a container has for each part, None where its members have nothing."""
    if all(parts is None for parts in inside):
        return None
    pairs = list(zip(inside, members, strict=True))
    return [make([whole if parts is None else parts[index] for parts, whole in pairs]) for index in range(count)]


def _like(value: Any, items: list[Any]) -> Any:
    return type(value)(*items) if hasattr(value, "_fields") and len(items) == len(value) else _plain(value)(items)


def _plain(value: Any) -> Any:
    return tuple if isinstance(value, tuple) else type(value)


def _mapping(value: Mapping[Any, Any], items: list[Any]) -> Any:
    fresh: Any = copy.copy(value)
    if not isinstance(fresh, MutableMapping):
        return dict(zip(value, items, strict=True))
    for name, item in zip(list(value), items, strict=True):
        fresh[name] = item
    return fresh


def _fields(value: Any, names: list[str], items: list[Any]) -> Any:
    fresh = copy.copy(value)
    for name, item in zip(names, items, strict=True):
        object.__setattr__(fresh, name, item)  # frozen ones too
    return fresh


def _holds_tensors(value: Any) -> bool:
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    rebuilt(value, note)
    return bool(found)
