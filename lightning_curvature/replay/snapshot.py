"""Everything within reach of some objects, saved, and put back in place."""

import contextlib
import copy
import functools
import io
import math
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass as _is_wrapper
from torch.utils.data import DataLoader

from lightning_curvature.operators.differentiation import put_back_at_exit
from lightning_curvature.replay import objects
from lightning_curvature.replay.memory import Tensors
from lightning_curvature.replay.objects import (
    FUNCTIONS,
    PLAIN,
    Restore,
    contents,
    has_attributes_alone,
    identical,
    opens,
    parts,
    put_back,
    restore_entries,
)
from lightning_curvature.replay.outside import FRAMEWORKS, classes_of, outside

# Objects of these are handles of the machine (process groups, compiled code), write elsewhere, or know the whole run.
_PACKAGES = FRAMEWORKS - {"torch"} | {"wandb", "mlflow", "tensorboard", "tensorboardX", "comet_ml", "neptune"}
_MODULES = ("torch._", "torch.distributed", "torch.fx", "torch.utils.data.dataloader", "torch.utils.tensorboard")
_OPENED: tuple[type, ...] = (Tensor, nn.Module, Optimizer, LightningOptimizer, torch.Generator, DataLoader)
_OPENED += (*FUNCTIONS, *objects.CONTAINERS, tuple)
# Of the standard library: what belongs to other threads or to the machine, and constants.
_CLOSED = {
    "_thread",
    "threading",
    "queue",
    "_queue",
    "multiprocessing",
    "concurrent",
    "asyncio",
    "logging",
    "io",
    "_io",
}
_CLOSED |= {"socket", "ssl", "select", "selectors", "subprocess", "tempfile", "sqlite3", "ctypes", "mmap"}
_CLOSED |= {"inspect", "typing", "re", "datetime", "pathlib", "importlib", "abc"}
# A context manager that decorates a function holds a generator that never runs: each call makes another.
_CLOSED |= {"contextlib"}
# Functions and classes whose surroundings are looked at, and objects that are reached through these alone: the nearest
# first, elements of containers with more than a hundred last. A script names some hundreds; a package on the path that
# registers all of its functions has 200 000, and took seconds in each measurement.
_CODE, _OUTSIDE, _MANY = 2000, 5000, 100
_HOLDERS = frozenset({dict, OrderedDict, set})
# A measurement replaces these itself: a step that is repeated must find them replaced.
_LINKS = {"_trainer", "_fabric", "prepare_data_per_node"}


def is_handle(value: Any) -> bool:
    """Return whether an object is not one to look into: it stands for the machine, for the run, or for this package."""
    kind: Any = type(value)
    if _is_of_handles(kind):
        return True
    if isinstance(value, FUNCTIONS):
        function = getattr(value, "func", value)
        home = getattr(getattr(function, "__func__", function), "__globals__", {})
        return str(home.get("__name__", "")).startswith("lightning_curvature.")
    return False


@functools.lru_cache(maxsize=4096)
def _is_of_handles(kind: Any) -> bool:
    home = kind.__module__
    known = home.partition(".")[0] in _PACKAGES or home.startswith(_MODULES)
    return known and not issubclass(kind, _OPENED)  # not isinstance: stand-ins claim to be what they stand for


def is_beyond(value: Any) -> bool:
    """Return whether an object is a handle or belongs to other threads, to the machine, or is a constant."""
    return is_handle(value) or type(value).__module__.partition(".")[0] in _CLOSED


def _is_state(name: str, value: Any) -> bool:
    return name not in _LINKS and not _is_table(name, value) and not isinstance(value, FUNCTIONS)


def _is_table(name: str, value: Any) -> bool:
    return (name.endswith("_hooks") or name == "_parameters") and isinstance(value, dict)


def _tables(root: Any) -> list[dict[str, Any]]:
    modules = root.modules() if isinstance(root, nn.Module) else ()
    return [value for module in modules for name, value in vars(module).items() if _is_table(name, value)]


class Snapshot:
    """Everything that is reachable from some objects: attributes, elements, variables, tensors, random generators.

    Also the attributes of their classes, and the globals that the user's code names (:mod:`~.replay.outside`). All is
    put back *into the same objects*, so that references held elsewhere stay good. Not reached: the Trainer, files,
    what other threads own, and the insides of compiled code.

    Args:
        roots: the objects.
        spared: addresses of memory that is not copied.
        whole: everything comes back exactly, with gradients, hooks, functions and version counters. Else it is the
            state from which a step is repeated: without hooks, functions and tables of parameters, which a measurement
            replaces itself.
        prepare: called with each object when its contents are saved, before the walk goes on into it.
        passed: objects that the walk passes by.

    Attributes:
        tensors: the tensors that were saved.
        seen: all objects, by ``id``.
        closed: those of them that cannot be written in place, by ``id``: iterators, open files, locks.
    """

    def __init__(
        self,
        roots: Iterable[Any],
        spared: Iterable[int] = (),
        whole: bool = True,
        prepare: Callable[[Any], object] = lambda value: None,
        passed: Iterable[Any] = (),
    ) -> None:
        self.seen, self.closed = {id(value): value for value in passed}, dict[int, Any]()
        self.tensors = Tensors(frozenset(spared), exactly=whole)
        self._whole, self._prepare, self._keep = whole, prepare, None if whole else _is_state
        self._restorers: list[Restore] = []
        self._attributes: list[tuple[dict[str, Any], dict[str, Any]]] = []  # now, and as they were
        self._empty: list[Any] = []
        self._code: list[Any] = []  # whose surroundings are still to be looked at
        self._last: list[Any] = []
        self._looked, self._most = 0, math.inf
        self.save(roots)

    def save(self, roots: Iterable[Any]) -> None:
        """Save these objects too, with all that is reachable from them."""
        roots = list(roots)
        # Others may hold these tables too (torch, of a compiled layer), where a measurement replaces parameters.
        for root in roots if not self._whole else ():
            self.seen |= {id(table): table for table in _tables(root)}
        objects.walk(roots, self._visit, self.seen)
        self._look_outside()

    def restore(self) -> None:
        """Put all back; what has not changed is not written."""
        with torch.no_grad():
            restorers = [*self._restorers, *(holder.clear for holder in self._empty if holder)]
            for now, before in self._attributes:
                if not identical(now, before):
                    restorers.append(functools.partial(restore_entries, now, before, self._keep))
            put_back([*restorers, *self.tensors.restorers()])

    @functools.cached_property
    def unrepeatable(self) -> list[str]:
        """Names of attributes that hold iterators or open files, whose position cannot be saved."""
        inside = {key for key, value in self.closed.items() if isinstance(value, (Iterator, io.IOBase))}
        holders = [value for value in self.seen.values() if inside and not isinstance(value, DataLoader)]
        containers, count = [v for v in holders if isinstance(v, (*objects.CONTAINERS, tuple))], -1
        while count != len(inside):
            count = len(inside)
            inside |= {id(v) for v in containers if not inside.isdisjoint(map(id, objects.elements(v)))}
        named = [item for value in holders for item in objects.attributes(value).items()]
        return [name for name, value in named if id(value) in inside and name != "__dict__"]

    def _visit(self, value: Any, level: int) -> Sequence[Any]:
        if len(self.seen) > self._most:
            return ()
        if is_handle(value):
            if isinstance(value, Iterator):
                self.closed[id(value)] = value
            return ()
        if not opens(value, _CLOSED):
            self.closed[id(value)] = value
            return ()
        if isinstance(value, Tensor):
            self.tensors.save(value)
        kind: Any = type(value)
        if alone := has_attributes_alone(kind):
            self._attributes.append((vars(value), dict(vars(value))))
        else:
            self._restorers += contents(value, self._keep)
        self._prepare(value)
        module = isinstance(value, nn.Module)
        inside = self._parts_of_module(value) if module else [*vars(value).values()] if alone else parts(value)
        self._follow([value] if isinstance(value, types.FunctionType) else classes_of(kind))
        if self._most < math.inf and len(inside) > _MANY:
            self._last += inside
            return ()
        return inside

    def _follow(self, code: Iterable[Any]) -> None:
        """Note functions, and classes that are new, to look at what is outside of them."""
        for one in code:
            if not isinstance(one, type):
                self._code.append(one)
            elif id(one) not in self.seen:
                self.seen[id(one)] = one
                self._code.append(one)

    def _look_outside(self) -> None:
        """Walk over what code holds and names: all code that is named, then what its objects consist of."""
        waiting, left = list[Any](), _OUTSIDE
        while self._code or waiting or self._last:
            while self._code:
                code, self._code = self._code[: _CODE - self._looked], []
                self._looked += len(code)
                waiting += [one for value in code for one in self._named(value)]
            if not waiting:
                waiting, self._last = self._last, []
            self._most, waiting, values = len(self.seen) + left, [], waiting
            objects.walk(values, self._visit, self.seen)
            left, self._most = max(self._most - len(self.seen), 0), math.inf

    def _named(self, value: Any) -> Iterable[Any]:
        """Yield the objects that a function or a class holds or names, and note the code among them."""
        restorers, found = outside(value)
        self._restorers += restorers
        for one in found:
            if isinstance(one, type):
                self._follow(classes_of(one))
            elif isinstance(one, types.FunctionType) and id(one) not in self.seen:
                self.seen[id(one)] = one
                yield from self._visit(one, 0)
            else:
                yield one

    def _parts_of_module(self, module: nn.Module) -> list[Any]:
        found: list[Any] = []
        for name, value in vars(module).items():
            kind = type(value)
            if kind in PLAIN:
                continue
            if kind in _HOLDERS and not value:  # most of them: tables of hooks
                if self._whole or kind is set or not name.endswith("_hooks"):
                    self._empty.append(value)
            elif _is_table(name, value) and (not self._whole or any(map(_is_wrapper, value.values()))):
                found += value.values()
                if name == "_parameters":
                    self._restorers.append(functools.partial(_restore_names, value, dict(value)))
            else:
                found.append(value)
        return found


def _restore_names(table: dict[str, Any], before: dict[str, Any]) -> None:
    """Remove what was added and add what was removed; what else stands there now may be a replacement."""
    for name in table.keys() - before.keys():
        del table[name]
    for name in before.keys() - table.keys():
        table[name] = before[name]


@contextlib.contextmanager
def restored(
    roots: Iterable[Any],
    passed: Iterable[Any] = (),
    prepare: Callable[[Any], object] = lambda value: None,
    copied: Callable[[Any, dict[int, Any]], Any] = copy.deepcopy,
) -> Generator[None, None, None]:
    """Put all objects within reach of the roots back at the end of the block, in place, also after an error.

    An object that cannot be written in place, such as an iterator, is replaced by a deep copy inside the block where a
    list, a dict or an attribute holds it, and left alone elsewhere. Arguments are those of :class:`Snapshot`, and
    ``copied``, which makes the deep copy.

    Raises:
        Exception: that of ``copied``, for an object that can neither be written in place nor copied.
    """
    snapshot = Snapshot((), prepare=prepare, passed=passed)
    with contextlib.ExitStack() as stack:
        put_back_at_exit(stack, snapshot.restore)
        snapshot.save(roots)  # ``prepare`` changes them: from here on whatever fails puts them back
        _replace(set(snapshot.closed), snapshot.seen, copied)
        yield


def _replace(closed: set[int], seen: dict[int, Any], copied: Callable[[Any, dict[int, Any]], Any]) -> None:
    """Put deep copies of the closed objects in their places; they share all other objects with them."""
    memo = {key: value for key, value in seen.items() if key not in closed}
    holders: list[Any] = (
        [one for value in seen.values() for one in (value, getattr(value, "__dict__", None))] if closed else []
    )
    for holder in holders:
        if isinstance(holder, (list, deque, dict)):
            for key, value in [*(holder.items() if isinstance(holder, dict) else enumerate(holder))]:
                if id(value) in closed:
                    holder[key] = copied(value, memo)
