"""The gatherings of a forward or backward (FSDP2): a rank on which one fails makes those that are left of it.

The others then come to its end, where they would wait for ever, and to the next exchange, which tells them.
"""

import contextlib
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from lightning_curvature.distributed.shards import groups, groups_of, units

Value = TypeVar("Value")
Pass = Literal["forward", "backward"]

# What FSDP2 does with a group of parameters; whether it communicates depends on what was done before.
_CALLS = ("unshard", "wait_for_unshard", "reshard", "post_backward")


@dataclass(frozen=True)
class _Call:
    """A call of FSDP2's: of which group, in which state, and which of its parameters then had a gradient."""

    group: Any
    name: str
    arguments: tuple[Any, ...]
    state: Any
    with_gradient: tuple[int, ...]

    def repeat(self) -> None:
        """Make it again, without the computation that led to it: gradients are NaN."""
        self.group._training_state = self.state
        for index in self.with_gradient:
            whole = self.group.fsdp_params[index].unsharded_param
            whole.grad = torch.full_like(whole, torch.nan)
        getattr(self.group, self.name)(*self.arguments)


class Gathers:
    """Knows the gatherings of a module's step, as the last forward and the last backward made them.

    Data that decide which layers run make another sequence each time: such a step is known up to where it is the same.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._known: dict[Pass, list[_Call]] = {}
        self._forwards, self._none = 0, False

    def whole(self, kind: Pass, compute: Callable[[], Value]) -> Value:
        """Return what a forward or backward returns; where it raises, make the gatherings that are left before."""
        if self._none or not groups(self._module):
            return compute()
        made: list[_Call] = []
        try:
            with self._noting(made):
                value = compute()
        except Exception as error:
            failure = error.with_traceback(None)  # whose frames hold the memory that gatherings may need
        else:
            self._known[kind] = made
            return value
        finally:
            self._forwards += kind == "forward"
        try:
            with contextlib.suppress(Exception):
                self._finish(kind, made)
            raise failure
        finally:
            del failure  # a cycle through its own frame

    @contextlib.contextmanager
    def forwards(self, count: int) -> Generator[None, None, None]:
        """Where the block raises before it has made so many forwards, make the gatherings of those that are left."""
        before = self._forwards
        try:
            yield
        except Exception:
            for _ in range(before + count - self._forwards):
                with contextlib.suppress(Exception):
                    self._finish("forward", [])
            self._forwards = max(self._forwards, before + count)
            raise

    @contextlib.contextmanager
    def none(self) -> Generator[None, None, None]:
        """Inside the block steps gather nothing."""
        self._none = True
        try:
            yield
        finally:
            self._none = False

    @contextlib.contextmanager
    def watching(self) -> Generator[None, None, None]:
        """Learn from a forward of the run itself, without its backwards."""
        if not groups(self._module):
            yield
            return
        made: list[_Call] = []
        with self._noting(made, forwards=True):
            yield
        self._known["forward"] = made

    def _finish(self, kind: Pass, made: list[_Call]) -> None:
        known = self._known.get(kind, [])
        if known[: len(made)] != made:
            return  # where the others are is not known
        with torch.no_grad():
            for call in known[len(made) :]:
                call.repeat()
        for state in (unit._get_fsdp_state() for unit in units(self._module)):
            if kind == "backward" and state._is_root:
                state._root_post_backward_final_callback()
            _rest(state)

    @contextlib.contextmanager
    def _noting(self, made: list[_Call], forwards: bool = False) -> Generator[None, None, None]:
        """Note the calls inside the block that return; ``forwards``: those of backwards left out.

        At the class: what is on its instances is within the module's reach, and a repeated step puts it back.
        """
        depth = 0

        def noting(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
            def noted(group: Any, *arguments: Any) -> Any:
                nonlocal depth
                call = _Call(group, name, arguments, group._training_state, _with_gradient(group, name))
                depth += 1
                try:
                    value = method(group, *arguments)
                finally:
                    depth -= 1
                backward = name == "post_backward" or torch._C._current_graph_task_id() != -1
                if not (depth or (forwards and backward)):
                    made.append(call)
                return value

            return noted

        kinds = {type(group) for group in groups(self._module)}
        before = [(kind, name, getattr(kind, name)) for kind in kinds for name in _CALLS]
        try:
            for kind, name, method in before:
                setattr(kind, name, noting(name, method))
            yield
        finally:
            for kind, name, method in before:
                setattr(kind, name, method)


def _with_gradient(group: Any, name: str) -> tuple[int, ...]:
    """Return which parameters of a group have a gradient that is about to be shared out."""
    if name != "post_backward":
        return ()
    pairs = enumerate(group.fsdp_params)
    return tuple(i for i, p in pairs if getattr(getattr(p, "_unsharded_param", None), "grad", None) is not None)


def _rest(state: Any) -> None:
    """Let a unit rest, as after a forward that came to its end."""
    context, communication = state._state_ctx, state._comm_ctx
    idle = type(state._training_state).IDLE
    context.iter_forward_root, state._training_state = None, idle
    for group in groups_of(state):
        group._training_state = idle
        if (gathered := communication.all_gather_state) is not None:
            group._wait_all_gather_streams_on_event(gathered.event)
            communication.all_gather_state = None
    getattr(state, "_modules_to_run_forward", set()).clear()
