"""Calls of submodules: recorded with what they return, and replaced by what they shall return."""

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_curvature.operators.differentiation import patched
from lightning_curvature.replay.randomness import RandomState


@dataclass
class Call:
    """What a module returned, in tensors of its own, and the random state after it."""

    name: str
    output: Any
    randomness: RandomState

    def detached(self) -> "Call":
        """Return the call without graphs."""
        return Call(self.name, rebuilt(self.output, Tensor.detach), self.randomness)


@contextlib.contextmanager
def recording_calls(
    module: nn.Module, names: Collection[str], device: torch.device
) -> Generator[list[Call], None, None]:
    """Record the calls of submodules inside the block, those inside another left out. Tensors keep their graphs."""
    calls, depth = list[Call](), 0

    def around(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            depth += 1
            try:
                output = forward(*args, **kwargs)
            finally:
                depth -= 1
            if not depth:
                # The step may write into what it was given.
                calls.append(Call(name, rebuilt(output, lambda tensor: tensor.clone()), RandomState(device)))
            return output

        return recorded

    with around_calls(module, names, around):
        yield calls


@contextlib.contextmanager
def replaying_calls(module: nn.Module, calls: Iterable[Call], outputs: Iterable[Any]) -> Generator[None, None, None]:
    """Let submodules return given outputs inside the block, in the order of their recorded calls, and not run."""
    pairs = list(zip(calls, outputs, strict=True))
    names = {call.name for call, _ in pairs}
    waiting = {name: iter([pair for pair in pairs if pair[0].name == name]) for name in names}

    def around(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def replayed(*args: Any, **kwargs: Any) -> Any:
            call, output = next(waiting[name], (None, None))
            if call is None:
                raise ValueError(f"a repeated step must make the calls that it made, got another one of {name!r}.")
            call.randomness.restore()
            return output

        return replayed

    with around_calls(module, names, around):
        yield


@contextlib.contextmanager
def around_calls(
    module: nn.Module,
    names: Collection[str],
    around: Callable[[str, Callable[..., Any]], Callable[..., Any]],
) -> Generator[None, None, None]:
    """Put a function around the forward of submodules: of the instance, since hooks split compiled graphs."""
    with contextlib.ExitStack() as stack:
        for name in sorted(names):
            submodule = module.get_submodule(name)
            # Without the attributes of a compiled function, by which torch would take it for one, and pass it over.
            put = functools.wraps(submodule.forward, updated=())(around(name, submodule.forward))
            stack.enter_context(patched(submodule, forward=put))
        yield


def rebuilt(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a copy of what a module returned with other tensors: tuples, lists, dicts and objects with fields."""
    return _rebuilt(value, change, {})


def _rebuilt(value: Any, change: Callable[[Tensor], Tensor], memo: dict[int, Any]) -> Any:
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, Tensor):
        memo[id(value)] = change(value)
    elif isinstance(value, (list, tuple)):
        parts = [_rebuilt(one, change, memo) for one in value]
        memo[id(value)] = type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    elif isinstance(value, dict) or (hasattr(value, "__dict__") and not isinstance(value, (nn.Module, type))):
        memo[id(value)] = fresh = copy.copy(value)
        for name, one in list(vars(fresh).items()) if hasattr(fresh, "__dict__") else []:
            vars(fresh)[name] = _rebuilt(one, change, memo)
        for name, one in list(dict.items(fresh)) if isinstance(fresh, dict) else []:
            dict.__setitem__(fresh, name, _rebuilt(one, change, memo))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):  # with slots
        fields = {f.name: _rebuilt(getattr(value, f.name), change, memo) for f in dataclasses.fields(value)}
        memo[id(value)] = dataclasses.replace(value, **fields)
    else:
        return value
    return memo[id(value)]


def floating(value: Any) -> list[Tensor]:
    """Return the real tensors in what a module returned, in a fixed order."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.extend([tensor] if tensor.is_floating_point() else [])
        return tensor

    rebuilt(value, note)
    return found


def filled(value: Any, tensors: Iterator[Tensor]) -> Any:
    """Return what a module returned with other real tensors, in the order of :func:`floating`, as copies."""
    return rebuilt(value, lambda old: next(tensors).clone() if old.is_floating_point() else old.clone())
