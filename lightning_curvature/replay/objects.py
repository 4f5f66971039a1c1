"""Walk over the objects that an object consists of, and put their contents back in place."""

import argparse
import copy
import functools
import operator
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
Keep = Callable[[Any, Any], bool]

# Constants and handles. A Trainer knows everything: a walk would never end.
_ATOMS: tuple[type, ...] = (bool, int, float, complex, str, bytes, type(None), type, types.ModuleType, pl.Trainer)
_ATOMS += (torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format)
FUNCTIONS = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, functools.partial)
CONTAINERS = (list, deque, set, dict)
# Other objects of the standard library belong to other threads (queues, log handlers) or hold no computation's state.
_BAGS = (types.SimpleNamespace, argparse.Namespace, random.Random, torch.Generator)
_OPEN = (*CONTAINERS, tuple, frozenset, *FUNCTIONS, weakref.ref, *_BAGS)
# Attributes of functions, methods and partials that refer to other objects.
_LINKS = ("__self__", "__func__", "func", "args", "keywords", "__defaults__", "__kwdefaults__")
_ABSENT = object()
STANDARD = {"numpy"} | sys.stdlib_module_names
FRAMEWORKS = {"torch", "lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities"}


def walk(roots: Iterable[Any], visit: Callable[[Any, int], Iterable[Any]], seen: dict[int, Any]) -> None:
    """Call ``visit(value, level)`` once for each object, nearest first; it returns the objects to visit next.

    Roots are on level 0. Constants are not visited, nor the objects in ``seen``, which receives the visited objects by
    ``id`` and keeps them alive, so that no other object has it.
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
    """Return whether an object is a container, a function, or can be put back and is not of a closed package."""
    package = type(value).__module__.partition(".")[0]
    stateful = hasattr(value, "__dict__") or package == "numpy" or bool(_slots(value))
    return isinstance(value, _OPEN) or (package not in closed and stateful)


def parts(value: Any) -> list[Any]:
    """Return the objects that an object directly consists of: elements, attributes, variables, a referent."""
    found = [*attributes(value).values()]
    if isinstance(value, (*CONTAINERS, tuple, frozenset)):
        found += elements(value)
    elif isinstance(value, FUNCTIONS):
        found += [getattr(value, name, None) for name in _LINKS] + [cell.cell_contents for cell in _cells(value)]
    elif isinstance(value, weakref.ref):
        found.append(value())
    return found


def elements(container: Any) -> list[Any]:
    """Return the elements of a container, the keys of a dict included."""
    return [*container.keys(), *container.values()] if isinstance(container, dict) else list(container)


def attributes(value: Any) -> dict[str, Any]:
    """Return the attributes of an object by name, those in slots included."""
    return {name: getattr(value, name) for name in _slots(value) if hasattr(value, name)} | (_namespace(value) or {})


def _namespace(value: Any) -> dict[str, Any] | None:
    namespace = getattr(value, "__dict__", None)
    return namespace if isinstance(namespace, dict) else None


def _slots(value: Any) -> list[str]:
    if not hasattr(type(value), "__slots__"):
        return []
    classes = [vars(cls) for cls in type(value).__mro__ if "__slots__" in vars(cls)]
    return [name for names in classes for name, one in names.items() if isinstance(one, types.MemberDescriptorType)]


def _cells(function: Any) -> list[types.CellType]:
    cells = function.__closure__ or () if isinstance(function, types.FunctionType) else ()
    return [cell for cell in cells if cell != types.CellType()]  # an empty one has no content


def put_back(restorers: Iterable[Restore]) -> None:
    """Call all functions, also where one fails, and raise the first error afterwards."""
    errors = []
    for restore in restorers:
        try:
            restore()
        except BaseException as error:
            errors.append(error)
    if errors:
        raise errors[0]


def contents(value: Any, keep: Keep | None = None) -> list[Restore]:
    """Return functions that put elements, attributes, closure variables and a state back into the same object.

    ``keep(name, attribute)`` says which attributes are put back; default: all.
    """
    restorers = [entries(value)] if isinstance(value, CONTAINERS) else []
    if not restorers and (restore := generator_state(value) or array_state(value)) is not None:
        return [restore]
    if (namespace := _namespace(value)) is not None:
        restorers.append(entries(namespace, keep))
    members = [(value, name) for name in _slots(value)] + [(cell, "cell_contents") for cell in _cells(value)]
    return restorers + [functools.partial(_set, one, name, getattr(one, name, _ABSENT)) for one, name in members]


def _set(owner: Any, name: str, content: object) -> None:
    if content is not _ABSENT:
        object.__setattr__(owner, name, content)
    elif hasattr(owner, name):
        object.__delattr__(owner, name)


def entries(holder: Any, keep: Keep | None = None) -> Restore:
    """Return a function that gives a list, deque, set or dict the entries that it has now, in their order.

    It writes only where they have changed: some mappings refuse to be written. ``keep(key, value)`` says which entries
    of a dict are put back; default: all.
    """
    return functools.partial(_restore_entries, holder, _kept(holder, keep), keep)


def _kept(holder: Any, keep: Keep | None) -> Any:
    if keep is not None:
        return {key: value for key, value in holder.items() if keep(key, value)}
    return dict(holder) if isinstance(holder, dict) else list(holder)


def _restore_entries(holder: Any, before: Any, keep: Keep | None) -> None:
    now = holder if keep is None else _kept(holder, keep)
    if _identical(now, before):
        return
    if not isinstance(holder, dict):
        holder.clear()
        (holder.update if isinstance(holder, set) else holder.extend)(before)
        return
    for key in [*now]:
        if key not in before:
            del holder[key]
    if not _identical([key for key in holder if key in before], list(before)):
        # One was deleted: the order of buffers is that of state_dict.
        for key in before:
            holder.pop(key, None)
    holder.update(before)


def _identical(one: Any, other: Any) -> bool:
    same = len(one) == len(other) and all(map(operator.is_, one, other))
    return same and not (isinstance(one, dict) and not all(map(operator.is_, one.values(), other.values())))


def array_state(value: Any) -> Restore | None:
    """Return a function that puts the numbers of a numpy array back, or None for other objects."""
    if type(value).__module__ == "numpy" and hasattr(value, "flags") and value.flags.writeable:
        return functools.partial(value.__setitem__, ..., value.copy())
    return None


def generator_state(value: Any) -> Restore | None:
    """Return a function that sets a random-number generator back, or None for other objects."""
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
