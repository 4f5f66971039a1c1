"""Walk over the objects that an object consists of, and put their contents back in place."""

import argparse
import array
import contextlib
import copy
import functools
import gc
import operator
import random
import sys
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_curvature.operators.differentiation import put_back_at_exit

Restore = Callable[[], object]
Keep = Callable[[Any, Any], bool]

# Constants and handles. A Trainer knows everything: a walk would never end.
_ATOMS: tuple[type, ...] = (bool, int, float, complex, str, bytes, type(None), type, types.ModuleType, pl.Trainer)
_ATOMS += (torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format)
PLAIN = frozenset({bool, int, float, str, type(None)})  # most of them, asked for first
_CONSTANTS, _MANY = PLAIN | {bytes, tuple, frozenset}, 1000
FUNCTIONS = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, functools.partial)
CONTAINERS = (list, deque, set, dict)
_BYTES = (bytearray, array.array)
# Other objects of the standard library may belong to other threads (queues, log handlers).
_BAGS = (types.SimpleNamespace, argparse.Namespace, random.Random, torch.Generator)
_OPEN = (*CONTAINERS, *_BYTES, tuple, frozenset, *FUNCTIONS, weakref.ref, *_BAGS)
# Attributes of functions, methods and partials that refer to other objects.
_LINKS = ("__self__", "__func__", "func", "args", "keywords", "__defaults__", "__kwdefaults__")
_ABSENT = object()
STANDARD = {"numpy"} | sys.stdlib_module_names


def walk(roots: Iterable[Any], visit: Callable[[Any, int], Iterable[Any]], seen: dict[int, Any]) -> None:
    """Call ``visit(value, level)`` once for each object, nearest first; it returns the objects to visit next.

    Roots are on level 0. Constants are not visited, nor the objects in ``seen``, which receives the visited objects by
    ``id`` and keeps them alive, so that no other object has it.
    """
    values, level = list(roots), 0
    with contextlib.ExitStack() as stack:
        put_back_at_exit(stack, gc.enable if gc.isenabled() else gc.disable)
        gc.disable()  # it would look again and again for garbage among what is being found
        while values:
            following: list[Any] = []
            for value in values:
                kind: Any = type(value)
                if kind in PLAIN or id(value) in seen:
                    continue
                # A stand-in claims to be what it stands for.
                if not (_is_any(kind, _ATOMS) if value.__class__ is kind else isinstance(value, _ATOMS)):
                    seen[id(value)] = value
                    following += visit(value, level)
            values, level = following, level + 1


@functools.lru_cache(maxsize=4096)
def _is_any(kind: Any, kinds: tuple[type, ...]) -> bool:
    return issubclass(kind, kinds)


def opens(value: Any, closed: Iterable[str]) -> bool:
    """Return whether an object is a container, a function, or can be put back and is not of a closed package."""
    kind: Any = type(value)
    if _is_any(kind, _OPEN):
        return True
    package = _package(kind)
    return package not in closed and (hasattr(value, "__dict__") or package == "numpy" or bool(_slots(value)))


@functools.lru_cache(maxsize=4096)
def _package(kind: Any) -> str:
    return str(kind.__module__).partition(".")[0]


def parts(value: Any) -> list[Any]:
    """Return the objects that an object directly consists of: elements, attributes, variables, a referent."""
    if type(value) is dict:
        return [] if are_constants(inside := elements(value)) else inside
    found = [*attributes(value).values()]
    if isinstance(value, (*CONTAINERS, tuple, frozenset)):
        found += () if are_constants(inside := elements(value)) else inside
    elif isinstance(value, FUNCTIONS):
        found += [getattr(value, name, None) for name in _LINKS] + [cell.cell_contents for cell in _cells(value)]
    elif isinstance(value, weakref.ref):
        found.append(value())
    elif type(value).__module__ == "numpy" and getattr(value, "dtype", None) is not None and value.dtype.hasobject:
        found += value.ravel().tolist()
    return found


def elements(container: Any) -> list[Any]:
    """Return the elements of a container, the keys of a dict included."""
    return [one for pair in _items(container) for one in pair] if isinstance(container, dict) else list(container)


def are_constants(values: Collection[Any]) -> bool:
    """Return whether many elements are constants, or tuples of them: an index of files is not walked over.

    Python's collector no longer tracks a tuple that it has found to hold constants alone.
    """
    return len(values) > _MANY and set(map(type, values)) <= _CONSTANTS and not any(map(gc.is_tracked, values))


def attributes(value: Any) -> dict[str, Any]:
    """Return the attributes of an object by name, those in slots included."""
    slots = {name: content for name, slot in _slots(value) if (content := _read(slot, value)) is not _ABSENT}
    return slots | (_namespace(value) or {})


def _namespace(value: Any) -> dict[str, Any] | None:
    namespace = getattr(value, "__dict__", None)
    return namespace if isinstance(namespace, dict) else None


def _slots(value: Any) -> tuple[tuple[str, Any], ...]:
    kind: Any = type(value)
    return _slots_of(kind)


@functools.lru_cache(maxsize=4096)
def _slots_of(kind: Any) -> tuple[tuple[str, Any], ...]:
    classes = [vars(cls) for cls in kind.__mro__ if "__slots__" in vars(cls)]
    return tuple(item for names in classes for item in names.items() if isinstance(item[1], types.MemberDescriptorType))


def _read(slot: Any, value: Any) -> Any:
    try:
        return slot.__get__(value)
    except AttributeError:
        return _ABSENT


def _cells(function: Any) -> list[types.CellType]:
    cells = function.__closure__ or () if isinstance(function, types.FunctionType) else ()
    return [cell for cell in cells if cell != types.CellType()]  # an empty one has no content


def put_back(restorers: Iterable[Restore]) -> None:
    """Call all functions, also where one fails, and raise the first error afterwards; an interrupt goes first.

    Where that is interrupted, all are called again: what they put back must not depend on how often.
    """
    restorers = list(restorers)
    try:
        errors = _call_all(restorers)
    except BaseException:
        _call_all(restorers)
        raise
    if errors and not interrupted():
        raise min(errors, key=lambda error: isinstance(error, Exception))  # an interrupt, or the first error


def interrupted() -> bool:
    """Return whether an interrupt is on its way out, which an error raised meanwhile would replace."""
    error = sys.exc_info()[1]
    while isinstance(error, Exception):
        error = error.__context__
    return error is not None


def _call_all(restorers: Iterable[Restore]) -> list[BaseException]:
    errors = []
    for restore in restorers:
        try:
            restore()
        except BaseException as error:
            errors.append(error)
    return errors


@functools.lru_cache(maxsize=4096)
def has_attributes_alone(kind: Any) -> bool:
    """Return whether modules or tensors of a type, beside the content of a tensor, consist of their namespace alone."""
    return issubclass(kind, (nn.Module, Tensor)) and not (issubclass(kind, CONTAINERS) or _slots_of(kind))


def contents(value: Any, keep: Keep | None = None) -> list[Restore]:
    """Return functions that put elements, attributes, closure variables and a state back into the same object.

    ``keep(name, attribute)`` says which attributes are put back; default: all.
    """
    kind: Any = type(value)
    if kind in CONTAINERS:
        return [entries(value)]
    restorers = [entries(value)] if isinstance(value, CONTAINERS) else []
    if not restorers and (restore := generator_state(value) or array_state(value)) is not None:
        restorers.append(restore)
    if (namespace := _namespace(value)) is not None:
        restorers.append(entries(namespace, keep))
    restorers += [functools.partial(_fill, slot, value, _read(slot, value)) for _, slot in _slots(value)]
    return restorers + [functools.partial(setattr, cell, "cell_contents", cell.cell_contents) for cell in _cells(value)]


def _fill(slot: Any, owner: Any, content: object) -> None:
    now = _read(slot, owner)
    if now is not content:
        slot.__set__(owner, content) if content is not _ABSENT else slot.__delete__(owner)


def entries(holder: Any, keep: Keep | None = None) -> Restore:
    """Return a function that gives a list, deque, set or dict the entries that it has now, in their order.

    It writes only where they have changed, past methods of a subclass: some mappings refuse to be written.
    ``keep(key, value)`` says which entries of a dict are put back; default: all.
    """
    return functools.partial(restore_entries, holder, _kept(holder, None), keep)


def _kept(holder: Any, keep: Keep | None) -> Any:
    if keep is not None:
        return {key: value for key, value in holder.items() if keep(key, value)}
    return dict(_items(holder)) if isinstance(holder, dict) else list(holder)


def _items(holder: dict[Any, Any]) -> Iterable[tuple[Any, Any]]:
    """Return keys and values past methods of a subclass; the order of an OrderedDict is its own."""
    return OrderedDict.items(holder) if isinstance(holder, OrderedDict) else dict.items(holder)


def restore_entries(holder: Any, before: Any, keep: Keep | None) -> None:
    """Give a list, deque, set or dict its entries as they were; arguments are those of :func:`entries`."""
    if identical(holder, before):
        return
    base: Any = next(kind for kind in (OrderedDict, *CONTAINERS) if isinstance(holder, kind))
    if not isinstance(holder, dict):
        base.clear(holder)
        (base.update if base is set else base.extend)(holder, before)
        return
    before = before if keep is None else _kept(before, keep)
    for key in [*_kept(holder, keep)]:
        if key not in before:
            base.__delitem__(holder, key)
    if not identical([key for key, _ in _items(holder) if key in before], list(before)):
        # One was deleted: the order of buffers is that of state_dict.
        for key in before:
            if dict.__contains__(holder, key):
                base.__delitem__(holder, key)
    for key, value in before.items():
        base.__setitem__(holder, key, value)


def identical(one: Any, other: Any) -> bool:
    """Return whether two lists or dicts hold the same objects in the same order."""
    if len(one) != len(other):
        return False
    if not isinstance(one, dict):
        return all(map(operator.is_, one, other))
    base: Any = OrderedDict if isinstance(one, OrderedDict) else dict
    return all(map(operator.is_, base.values(one), other.values())) and all(map(operator.is_, base.keys(one), other))


def array_state(value: Any) -> Restore | None:
    """Return a function that puts the numbers of a numpy or other array back, or None for other objects."""
    if isinstance(value, _BYTES):
        return functools.partial(operator.setitem, value, slice(None), value[:])
    if type(value).__module__ == "numpy" and hasattr(value, "flags") and value.flags.writeable:
        return functools.partial(_refill, value, value.copy())
    return None


def _refill(value: Any, content: Any) -> None:
    if value.shape != content.shape:
        value.resize(content.shape, refcheck=False)
    value[...] = content


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
