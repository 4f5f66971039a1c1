"""State outside an object that its code can write: attributes of its classes, and globals that its functions name."""

import dis
import functools
import os
import types
from typing import Any, NamedTuple

from lightning_curvature.replay.objects import FUNCTIONS, STANDARD, Restore

_OURS = __name__.partition(".")[0]
FRAMEWORKS = {"torch", "lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities", _OURS}
# Code in these is not the user's: installed, of the standard library, of this package.
_INSTALLED = (
    "site-packages",
    "dist-packages",
    os.path.dirname(os.__file__),
    os.path.dirname(os.path.dirname(__file__)),
)
_METHODS = (staticmethod, classmethod)
_CODE = (*FUNCTIONS, *_METHODS, property, types.MemberDescriptorType, types.GetSetDescriptorType)


@functools.lru_cache(maxsize=4096)
def classes_of(kind: Any) -> tuple[type, ...]:
    """Return a class and its bases, without those of torch, Lightning and the standard library."""
    return tuple(one for one in kind.__mro__ if one.__module__.partition(".")[0] not in STANDARD | FRAMEWORKS)


def outside(value: type | types.FunctionType) -> tuple[list[Restore], list[Any]]:
    """Return functions that put back what a class or the code of a function can write, and the objects found there.

    Of a class these are its attributes. Of a function of the user's own files they are the globals of its module, or of
    another of the user's, which the code names: those that it assigns are put back, the contents of others are theirs.
    """
    restorers: list[Restore] = []
    found: list[Any] = []
    if isinstance(value, types.FunctionType):
        _globals_of(value, restorers, found)
        return restorers, found
    for name, one in [*vars(value).items()]:
        if isinstance(one, _CODE):
            found += _functions(one)
        elif not name.startswith(("__", "_abc_")):
            restorers.append(functools.partial(_set, value, name, one))
            found.append(one)
    return [*restorers, functools.partial(_delete_others, value, set(vars(value)))], found


def _set(owner: Any, name: str, value: object) -> None:
    if vars(owner).get(name, owner) is not value:  # never among its own
        setattr(owner, name, value)


def _delete_others(kind: type, names: set[str]) -> None:
    if len(vars(kind)) != len(names):
        for name in set(vars(kind)) - names:
            if not name.startswith("__"):  # Python adds some when asked
                delattr(kind, name)


def _functions(one: Any) -> list[types.FunctionType]:
    inner = [one.fget, one.fset] if isinstance(one, property) else [getattr(one, "__func__", one)]
    return [function for function in inner if isinstance(function, types.FunctionType)]


def _globals_of(function: types.FunctionType, restorers: list[Restore], found: list[Any]) -> None:
    names = _names(function.__code__)
    others = [function.__globals__.get(name) for name in names.read]
    modules = [
        vars(m) for m in others if isinstance(m, types.ModuleType) and _is_own(getattr(m, "__file__", None) or "")
    ]
    for namespace in (function.__globals__, *modules):
        for name in names.read & namespace.keys():
            one = namespace[name]
            if not isinstance(one, types.FunctionType) or _is_own(one.__code__.co_filename):
                found.append(one)
                if name in names.assigned:
                    restorers.append(functools.partial(namespace.__setitem__, name, one))
    for name in names.created - function.__globals__.keys():
        restorers.append(functools.partial(function.__globals__.pop, name, None))


class _Names(NamedTuple):
    """Names in code: read as globals or attributes, assigned as either, assigned as globals."""

    read: frozenset[str] = frozenset()
    assigned: frozenset[str] = frozenset()
    created: frozenset[str] = frozenset()


@functools.lru_cache(maxsize=2**15)  # more than one walk meets
def _names(code: types.CodeType) -> _Names:
    """Return the names in code of the user's; none of other code."""
    if not _is_own(code.co_filename):
        return _Names()
    stored = [(i.opname, i.argval) for i in dis.get_instructions(code) if i.opname in ("STORE_GLOBAL", "STORE_ATTR")]
    own = (code.co_names, [name for _, name in stored], [name for kind, name in stored if kind == "STORE_GLOBAL"])
    inner = [_names(one) for one in code.co_consts if isinstance(one, types.CodeType)]
    return _Names(*(frozenset(names).union(*more) for names, *more in zip(own, *inner, strict=True)))


@functools.lru_cache(maxsize=4096)
def _is_own(file: str) -> bool:
    return bool(file) and not file.startswith("<frozen") and not any(place in file for place in _INSTALLED)
