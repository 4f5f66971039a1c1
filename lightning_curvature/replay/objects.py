"""Walk over the objects that an object consists of, and put their contents back in place."""

import argparse
import copy
import functools
import random
import sys
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import lightning.pytorch as pl
import torch

Restore = Callable[[], object]

# Constants and handles. A Trainer knows everything: a walk would never end.
_ATOMS: tuple[type, ...] = (bool, int, float, complex, str, bytes, type(None), type, types.ModuleType, pl.Trainer)
_ATOMS += (torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format)
FUNCTIONS = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, functools.partial)
CONTAINERS = (list, deque, set, dict)
# Other objects of the standard library belong to other threads (queues, log handlers) or hold no computation's state.
_OPEN = (*CONTAINERS, tuple, frozenset, *FUNCTIONS, weakref.ref, types.SimpleNamespace, argparse.Namespace)
STANDARD = {"numpy"} | sys.stdlib_module_names
FRAMEWORKS = {"torch", "lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities"}


def walk(roots: Iterable[Any], visit: Callable[[Any, int], Iterable[Any]], seen: dict[int, Any]) -> None:
    """Call ``visit(value, level)`` once for each object, nearest first; it returns the objects to visit next.

    Args:
        roots: the objects on level 0.
        visit: not called for constants.
        seen: receives the visited objects by ``id``; those in there are not visited. It keeps ids from being reused.
    """
    values, level = list(roots), 0
    while values:
        following: list[Any] = []
        for value in values:
            if not isinstance(value, _ATOMS) and id(value) not in seen:
                seen[id(value)] = value
                following += visit(value, level)
        values, level = following, level + 1


def opens(value: Any, closed: Iterable[str]) -> bool:
    """Return whether an object is a container, a function, or of a class outside the closed packages."""
    return isinstance(value, _OPEN) or type(value).__module__.partition(".")[0] not in closed


def parts(value: Any) -> list[Any]:
    """Return the objects that an object directly consists of: elements, attributes, variables, a referent."""
    found = list(attributes(value).values())
    if isinstance(value, (*CONTAINERS, tuple, frozenset)):
        found += elements(value)
    elif isinstance(value, types.FunctionType):
        found += [*(cell.cell_contents for cell in _cells(value)), value.__defaults__, value.__kwdefaults__]
    elif isinstance(value, types.MethodType):
        found += [value.__self__, value.__func__]
    elif isinstance(value, types.BuiltinFunctionType):
        found.append(value.__self__)
    elif isinstance(value, functools.partial):
        found += [value.func, value.args, value.keywords]
    elif isinstance(value, weakref.ref):
        found.append(value())
    return found


def elements(container: Any) -> list[Any]:
    """Return what a container holds, the keys of a dict included."""
    return [*container.keys(), *container.values()] if isinstance(container, dict) else list(container)


def attributes(value: Any) -> dict[str, Any]:
    """Return the attributes of an object by name, those in slots included."""
    return {name: getattr(value, name) for name in _slots(value) if hasattr(value, name)} | (_namespace(value) or {})


def _namespace(value: Any) -> dict[str, Any] | None:
    namespace = getattr(value, "__dict__", None)
    return namespace if isinstance(namespace, dict) else None


def _slots(value: Any) -> list[str]:
    classes = [vars(cls) for cls in type(value).__mro__ if "__slots__" in vars(cls)]
    return [name for names in classes for name, one in names.items() if isinstance(one, types.MemberDescriptorType)]


def _cells(function: types.FunctionType) -> list[types.CellType]:
    return [cell for cell in function.__closure__ or () if cell != types.CellType()]  # without the empty ones


def contents(value: Any, keep: Callable[[str, Any], bool] | None = None) -> Restore:
    """Return a function that puts elements, attributes and closure variables back into the same object.

    It writes only to what has changed: some mappings refuse to be written.

    Args:
        value: a container, a function or an object with attributes.
        keep: ``keep(name, attribute)`` says which attributes are put back; default: all.
    """
    restorers: list[Restore] = []
    if isinstance(value, CONTAINERS):
        restorers.append(entries(value))
    if (namespace := _namespace(value)) is not None:
        restorers.append(entries(namespace, keep))
    for name in _slots(value):
        restorers.append(_member(value, name))
    if isinstance(value, types.FunctionType):
        restorers += [_member(cell, "cell_contents") for cell in _cells(value)]

    def restore() -> None:
        for restorer in restorers:
            restorer()

    return restore


def _member(owner: Any, name: str) -> Restore:
    """Return a function that sets a slot or a cell back."""
    if hasattr(owner, name):
        return functools.partial(object.__setattr__, owner, name, getattr(owner, name))

    def remove() -> None:
        if hasattr(owner, name):
            object.__delattr__(owner, name)

    return remove


def entries(holder: Any, keep: Callable[[Any, Any], bool] | None = None) -> Restore:
    """Return a function that gives a list, deque, set or dict the entries that it has now, in their order.

    Args:
        holder: the container.
        keep: ``keep(key, value)`` says which entries of a dict are put back; default: all.
    """

    def kept() -> Any:
        if isinstance(holder, dict):
            return {key: value for key, value in holder.items() if keep is None or keep(key, value)}
        return list(holder)

    before = kept()

    def restore() -> None:
        now = kept()
        if _identical(now, before):
            return
        if not isinstance(holder, dict):
            holder.clear()
            (holder.update if isinstance(holder, set) else holder.extend)(before)
            return
        for key in now:
            if key not in before:
                del holder[key]
        if not _identical([key for key in holder if key in before], list(before)):
            # One was deleted: the order of buffers is that of state_dict.
            for key in before:
                holder.pop(key, None)
        holder.update(before)

    return restore


def _identical(one: Any, other: Any) -> bool:
    return [*map(id, elements(one))] == [*map(id, elements(other))]


def array_state(value: Any) -> Restore | None:
    """Return a function that puts the numbers of a numpy array back, or None for all else."""
    if type(value).__module__ == "numpy" and hasattr(value, "flags") and value.flags.writeable:
        return functools.partial(value.__setitem__, ..., value.copy())
    return None


def generator_state(value: Any) -> Restore | None:
    """Return a function that sets a random-number generator back, or None for all else."""
    if isinstance(value, torch.Generator):
        return functools.partial(value.set_state, value.get_state())
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
        return functools.partial(value.setstate, value.getstate())
    if type(value).__module__.startswith("numpy.random"):
        if hasattr(value, "bit_generator"):
            return functools.partial(setattr, value.bit_generator, "state", copy.deepcopy(value.bit_generator.state))
        if hasattr(value, "set_state"):
            return functools.partial(value.set_state, value.get_state())
    return None
