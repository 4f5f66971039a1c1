"""Modes that meet the kinked operations of an evaluation: that note their sides, or keep them on these."""

import contextlib
import functools
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_curvature.operators.kinks import KINKS, kink_of


@dataclass(frozen=True)
class Side:
    """On which side of its kinks one operation was."""

    kink: str
    number: Tensor


@contextlib.contextmanager
def eager(mode: contextlib.AbstractContextManager[object] | None) -> Generator[None, None, None]:
    """Enter a mode, in which code that was compiled runs as it was written; None enters nothing."""
    if mode is None:
        yield
        return
    with torch.compiler.set_stance("force_eager"), mode:
        yield


class Watching(TorchDispatchMode):
    """Base of modes that meet kinked operations."""

    # What the last operation has copied, and the copy: before one in place autograd may keep one of the operand.
    _copied: tuple[Tensor, Tensor] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs, copied = kwargs or {}, self._copied
        self._copied = None
        name, run = kink_of(func), functools.partial(func, *args, **kwargs)
        if name is None or not (isinstance(args[0], Tensor) and args[0].is_floating_point()):
            result = run()
            if func is torch.ops.aten.clone.default:
                self._copied = args[0], result
            return result
        described = func._schema.arguments
        arguments = {one.name: one.default_value for one in described if one.has_default_value()}
        arguments |= {one.name: value for one, value in zip(described, args, strict=False)} | kwargs
        if not KINKS[name].applies(arguments):
            return run()
        if copied is not None and copied[0] is args[0] and func._schema.name.endswith("_"):
            arguments["copy"] = copied[1]
        result = self.meet(name, arguments, run)
        # In place: what was given is written and returned.
        return result if result is args[0] or not func._schema.name.endswith("_") else args[0].copy_(result)

    def meet(self, name: str, arguments: dict[str, Any], run: Callable[[], Any]) -> Any:
        """Return the result of a kinked operation; ``run`` is the operation itself."""
        raise NotImplementedError


class Looking(Watching):
    """Note the sides of all kinked operations in their order, and what ``note`` returns of their arguments by name."""

    def __init__(self, note: Callable[[dict[str, Any]], Any] | None = None) -> None:
        super().__init__()
        self._note = note

    def __enter__(self) -> "Looking":
        self.sides: list[Side] = []  # a step that begins again
        self.notes: list[Any] = []
        return super().__enter__()

    def meet(self, name: str, arguments: dict[str, Any], run: Callable[[], Any]) -> Any:
        """Note the side."""
        kink = KINKS[name]
        if self._note is not None:
            self.notes.append(self._note(arguments))
        if not kink.chooses:
            self.sides.append(Side(name, kink.side(arguments)))  # before it runs: it may be in place
            return run()
        result = run()
        known = dict(zip(("result", "indices"), parts(result), strict=False))
        # A copy: a step may write into its masks and indices.
        self.sides.append(Side(name, kink.side(arguments | known).clone()))
        return result


class Frozen(Watching):
    """Evaluate kinked operations on given sides.

    Args:
        sides: those of the operations, in their order.
        differentiated: whether the backward is to be that of these sides too. What autograd keeps of an operation tells
            its backward the side; so an operand that has come to the other side goes back to the kink itself. The
            value is then off by what it lies beyond, at the few places where it does.
    """

    def __init__(self, sides: Sequence[Side], differentiated: bool = False) -> None:
        super().__init__()
        self._sides, self._differentiated = sides, differentiated
        self._other, self._waiting = False, list[Side]()

    def __enter__(self) -> "Frozen":
        self._other, self._waiting = False, list(reversed(self._sides))
        return super().__enter__()

    @property
    def other(self) -> bool:
        """Whether an operation was not that of its side, or did not come."""
        return self._other or bool(self._waiting)

    def meet(self, name: str, arguments: dict[str, Any], run: Callable[[], Any]) -> Any:
        """Evaluate it on its side, or as it is where it is not the operation of that side."""
        if not self._other and self._waiting and self._waiting[-1].kink == name:
            kink, number = KINKS[name], self._waiting.pop().number
            try:
                if kink.onto is None or not self._differentiated:
                    return kink.branch(arguments, number)
                if "copy" in arguments:
                    kink.onto(arguments | {"self": arguments["copy"]}, number)
                result = kink.onto(arguments, number)
                return run() if result is None else result
            except RuntimeError:  # it is of another shape
                pass
        self._other = True
        return run()


def parts(result: Any) -> Sequence[Tensor]:
    """Return the tensors of a result."""
    return [result] if isinstance(result, Tensor) else result
