"""A second look at everything within reach, which knows nothing of how it is saved and put back."""

import gc
import operator
import random
import types
import zlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_curvature.replay import objects
from lightning_curvature.replay.memory import sums
from lightning_curvature.replay.snapshot import is_beyond

# Python's collector follows a function to its globals and an object to its class: those are not within reach.
_BEYOND = (types.FrameType, types.CodeType, types.GetSetDescriptorType, types.MemberDescriptorType)


class Witness:
    """Notes every object that Python's garbage collector reaches from some objects, and what each refers to.

    Of tensors, arrays and random generators it notes sums and states.
    """

    def __init__(self, roots: Iterable[Any]) -> None:
        self._marks: dict[int, Any] = {}
        self._seen: dict[int, Any] = {}
        self._holders: dict[int, Any] = {}
        objects.walk(roots, self._visit, self._seen)

    def _visit(self, value: Any, level: int) -> Iterable[Any]:
        if isinstance(value, _BEYOND) or is_beyond(value):
            return ()
        self._marks[id(value)] = mark = _mark(value)
        inside = () if objects.are_constants(mark[0]) else mark[0]
        for one in inside:
            self._holders.setdefault(id(one), value)
        return inside

    def differences(self) -> list[str]:
        """Return the names of objects that are not as they were, the nearest first."""
        changed = [key for key, mark in self._marks.items() if not _same(_mark(self._seen[key]), mark)]
        return [self._name(self._seen[key]) for key in changed]

    def _name(self, value: Any) -> str:
        """Return a path of attributes, keys and types that leads to an object."""
        names: list[str] = []
        while (holder := self._holders.get(id(value))) is not None and len(names) < 8:
            if isinstance(holder, dict):
                names += [str(key) for key, one in holder.items() if one is value][:1]
            value = holder
        return ".".join(reversed(names)) or type(value).__name__


def _mark(value: Any) -> tuple[list[Any], Any]:
    """Return the objects to which a value refers, and its content where it has one of its own."""
    referents: list[Any]
    if type(value) is dict:  # whose layout, and with it the order of its referents, may change with no key or value
        referents = [*value.keys(), *value.values()]
    elif isinstance(value, types.FunctionType):
        referents = [value.__closure__, value.__defaults__, value.__kwdefaults__, value.__dict__]
    else:
        getattr(value, "__dict__", None)  # from now on the attributes are in a dict
        referents = [one for one in gc.get_referents(value) if not isinstance(one, (type, types.ModuleType))]
    if isinstance(value, (set, frozenset)):
        referents.sort(key=id)
    if isinstance(value, Tensor):
        flags = value.requires_grad, value.is_leaf, value.shape
        return [value.__dict__, value.grad if value.is_leaf else None], (flags, _content(value))
    return referents, _content(value)


def _content(value: Any) -> Any:
    if isinstance(value, Tensor):
        return sums(value)
    if isinstance(value, torch.Generator):
        return bytes(value.get_state().tolist())
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
        return value.getstate()
    if isinstance(value, bytearray) or type(value).__module__ == "array":
        return bytes(value)
    if type(value).__module__ == "numpy" and hasattr(value, "tobytes"):
        return zlib.crc32(value.tobytes())
    if type(value).__module__.startswith("numpy.random") and hasattr(value, "bit_generator"):
        return repr(value.bit_generator.state)
    return None


def _same(now: tuple[list[Any], Any], before: tuple[list[Any], Any]) -> bool:
    same = len(now[0]) == len(before[0]) and all(map(operator.is_, now[0], before[0]))
    return same and now[1] == before[1]
