"""A batch cut into its samples, each a batch of one."""

import copy
import dataclasses
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor

from lightning_curvature.replay.calls import rebuilt

# What all samples share: None, or one part for each sample.
_Parts = Sequence[Any] | None


def cut_samples(batch: Any, size: int) -> list[Any]:
    """Return the samples of a batch.

    Each has one row of every tensor with ``size`` rows, one item of every list of ``size`` items of one form that have
    not so many rows themselves (images of several sizes), what its own ``to_data_list`` and ``from_data_list`` make of
    a batch of graphs, and all else. Lists, tuples, dicts and their kin, and dataclasses are looked into.

    Raises:
        ValueError: if nothing can be cut, or a member holds tensors of which nobody knows how.
    """
    parts = _cut(batch, size)
    if parts is None:
        raise ValueError(f"a batch must hold a tensor with a row for each of its {size} samples, got none")
    return list(parts)


def _cut(value: Any, size: int) -> _Parts:
    if isinstance(value, Tensor):
        return value.split(1) if value.ndim and len(value) == size else None
    if hasattr(value, "to_data_list") and hasattr(type(value), "from_data_list"):
        samples = value.to_data_list()
        return [type(value).from_data_list([one]) for one in samples] if len(samples) == size else None
    if isinstance(value, (list, tuple)):
        inside = [_cut(one, size) for one in value]
        # A pair of inputs and targets is no batch of two.
        if len(value) == size and _are_alike(value) and None in inside:
            return [_like(value, [one]) for one in value]
        return _together(inside, value, lambda items: _like(value, items), size)
    if isinstance(value, Mapping):
        inside = [_cut(one, size) for one in value.values()]
        return _together(inside, value.values(), lambda items: _mapping(value, items), size)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        members = [getattr(value, name) for name in names]
        inside = [_cut(one, size) for one in members]
        return _together(inside, members, lambda items: _fields(value, names, items), size)
    if _holds_tensors(value):
        raise ValueError(
            f"a batch must be cut into its samples, got a {type(value).__name__} that holds tensors: make batches of "
            "tensors, lists, dicts and dataclasses, or give it to_data_list and from_data_list"
        )
    return None


def _are_alike(items: Sequence[Any]) -> bool:
    """Return whether items may be the samples of a batch: of one type and form, and holding tensors."""

    def form(item: Any) -> Any:
        if isinstance(item, Tensor):
            return item.ndim, item.dtype
        return type(item), tuple(item) if isinstance(item, Mapping) else None

    return len({form(item) for item in items}) == 1 and _holds_tensors(items)


def _together(inside: list[_Parts], members: Iterable[Any], make: Any, size: int) -> _Parts:
    """Return what a container has for each sample, None where its members have nothing."""
    if all(parts is None for parts in inside):
        return None
    pairs = list(zip(inside, members, strict=True))
    return [make([whole if parts is None else parts[index] for parts, whole in pairs]) for index in range(size)]


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
