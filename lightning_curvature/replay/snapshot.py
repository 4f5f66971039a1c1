"""Put objects and everything that they consist of back, bit for bit, after a block that may write to any of it."""

import contextlib
import copy
import functools
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightning_curvature.replay.objects import Restore, contents, opens, parts, put_back, walk

# Objects of these are handles of the machine (process groups, compiled code) or know the whole run: they are left out.
_HANDLES = ("torch._", "torch.distributed", "lightning", "pytorch_lightning")
_OPENED = (Tensor, nn.Module, Optimizer, torch.Generator)


@contextlib.contextmanager
def restored(
    roots: Iterable[Any], spared: Iterable[Tensor] = (), prepare: Callable[[Any], object] = lambda value: None
) -> Generator[None, None, None]:
    """Put all objects within reach of the roots back at the end of the block, in place, also after an error.

    Tensors get back their content, memory, gradient, flag and version counter, so that autograd graphs that have saved
    them remain valid; shared memory is copied once. An object that cannot be written in place, such as an iterator, is
    replaced by a deep copy inside the block where a list, a dict or an attribute holds it, and left alone elsewhere.

    Args:
        roots: the objects.
        spared: tensors that the block does not write; they are not copied.
        prepare: called with each object when its contents are saved, before the walk goes on into it.

    Raises:
        Exception: that of ``copy.deepcopy``, for an object that can neither be written in place nor copied.
    """
    left_out, closed = {id(tensor) for tensor in spared}, set[int]()
    memory, seen = set[tuple[int, int]](), dict[int, Any]()
    restorers: list[Restore] = []

    def visit(value: Any, level: int) -> Iterable[Any]:
        handle = type(value).__module__.startswith(_HANDLES) and not isinstance(value, _OPENED)
        if handle or id(value) in left_out:
            return ()
        if not opens(value, sys.stdlib_module_names):
            closed.add(id(value))
            return ()
        if isinstance(value, Tensor):
            _save_tensor(value, restorers, memory)
        restorers.extend(contents(value))
        prepare(value)
        return parts(value)

    try:
        walk(roots, visit, seen)
        if closed:
            _replace(closed, seen)
        yield
    finally:
        put_back(reversed(restorers))


def _replace(closed: set[int], seen: dict[int, Any]) -> None:
    """Put deep copies of the closed objects in their places; they share all other objects with them."""
    memo = {key: value for key, value in seen.items() if key not in closed}
    holders: list[Any] = [one for value in seen.values() for one in (value, getattr(value, "__dict__", None))]
    for holder in holders:
        if isinstance(holder, (list, deque, dict)):
            for key, value in [*(holder.items() if isinstance(holder, dict) else enumerate(holder))]:
                if id(value) in closed:
                    holder[key] = copy.deepcopy(value, memo)


def _save_tensor(value: Tensor, restorers: list[Restore], memory: set[tuple[int, int]]) -> None:
    if not value.is_inference():
        restorers.append(_unsafe_preserve_version_counter(value).__exit__)
    if value.is_leaf:
        restorers.append(functools.partial(_restore_leaf, value, value.requires_grad, value.grad))
    if is_traceable_wrapper_subclass(value):
        return  # the tensors inside are attributes
    restorers.append(functools.partial(setattr, value, "data", value.data))
    for plain in (value,) if value.layout == torch.strided else (value._indices(), value._values()):
        storage = plain.untyped_storage()
        place = storage.data_ptr(), storage.nbytes()
        if place not in memory:
            memory.add(place)
            restorers.append(functools.partial(_refill, storage, _bytes_of(storage).clone()))


def _restore_leaf(value: Tensor, requires_grad: bool, gradient: Tensor | None) -> None:
    if not value.is_leaf:
        value.detach_()
    value.requires_grad_(requires_grad)
    value.grad = gradient


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    # Writing through a tensor of its own leaves the version counters of the others alone.
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _refill(storage: torch.UntypedStorage, content: Tensor) -> None:
    if storage.nbytes() != content.numel():
        storage.resize_(content.numel())
    _bytes_of(storage).copy_(content)
