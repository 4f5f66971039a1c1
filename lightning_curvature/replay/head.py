"""The head of a loss: what a step computes of the outputs of the network, without the network.

A :class:`Trace` of one step finds the modules whose outputs the loss is a function of, a :class:`Cut`. Their calls are
recorded in later steps; in a repetition they return given tensors in place of running.
"""

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_curvature.distributed.shards import is_sharded
from lightning_curvature.operators.differentiation import differentiable
from lightning_curvature.operators.micro_batches import Evaluation
from lightning_curvature.replay.calls import Call, around_calls, filled, floating, rebuilt, replaying_calls

Node = Any  # of the graph of autograd


@dataclass(frozen=True)
class Cut:
    """Where a loss is cut off from the network.

    Attributes:
        made: names of the modules whose outputs the loss is a function of.
        passed: names of modules that it does not need to run.
        parameters: positions, in a list of trained parameters, of those that it reaches beside the outputs.
    """

    made: frozenset[str]
    passed: frozenset[str]
    parameters: tuple[int, ...]


@dataclass(eq=False)
class _Traced:
    """A call of a module that holds parameters, with the nodes of its outputs that have a graph."""

    name: str
    trained: bool
    inside: list["_Traced"] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    scalar: bool = False  # one of them is a scalar, such as a loss

    def all_inside(self) -> Iterator["_Traced"]:
        for call in self.inside:
            yield call
            yield from call.all_inside()


class Trace:
    """The calls of all modules that hold parameters, in one step.

    Args:
        module: the module.
        trained: its trained parameters.
    """

    def __init__(self, module: nn.Module, trained: Iterable[Tensor]) -> None:
        trained = list(trained)
        self._module, self._trained = module, {id(p): index for index, p in enumerate(trained)}
        self._sharded = is_sharded(trained)
        self._top = _Traced("", trained=False)
        self._open = [self._top]

    @contextlib.contextmanager
    def tracing(self) -> Generator[None, None, None]:
        """Trace the calls inside the block, which has gradients."""
        own = {
            name: [id(p) for p in sub.parameters()]
            for name, sub in self._module.named_modules()
            if "parametrizations" not in name.split(".")  # they make weights, and no outputs
        }

        def around(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
            def traced(*args: Any, **kwargs: Any) -> Any:
                call = _Traced(name, trained=any(number in self._trained for number in own[name]))
                self._open[-1].inside.append(call)
                self._open.append(call)
                try:
                    output = forward(*args, **kwargs)
                finally:
                    self._open.pop()
                with_graph = [tensor for tensor in floating(output) if tensor.grad_fn is not None]
                call.nodes = [tensor.grad_fn for tensor in with_graph]
                call.scalar = any(tensor.ndim == 0 for tensor in with_graph)
                return output

            return traced

        with around_calls(self._module, [name for name, ids in own.items() if ids], around):
            yield

    def cut(self, loss: Tensor, outputs: str | None) -> Cut:
        """Return where to cut the loss.

        The outputs are those of the module's own forward, or of the one that the user names, where the loss depends on
        no other trained module beside them; else of the last modules with trained parameters on each path to the loss.

        Args:
            loss: with its graph.
            outputs: name of the module that the user names, or None.

        Raises:
            ValueError: if no module makes them.
        """
        every = list(self._top.all_inside())
        own = [call for call in every if call.name == (outputs or "")]
        made = [call for call in own if call.trained and not call.scalar]
        reached, parameters = self._walk(loss, made)
        if outputs is None:
            others = {id(call) for call in every if call.trained} - {id(c) for o in own for c in (o, *o.all_inside())}
            beside = any(id(call) in others and set(call.nodes) & reached for call in every)
            if not made or any(call.scalar for call in own) or beside or not _met(made, reached):
                made = [call for call in every if call.trained and not call.scalar]
                reached, parameters = self._walk(loss, made)
                made = _met(_outermost(made), reached)
        if parameters and self._sharded:
            raise ValueError("the loss reaches sharded parameters beside the outputs")
        if not made:
            raise ValueError("no module with trained parameters makes outputs that the loss depends on")
        names = {call.name for call in made}
        if any("_orig_mod" in name.split(".")[:-1] for name in names):
            raise ValueError(f"the outputs are made inside of compiled code, by {sorted(names)}")
        passed, needed = set[str](), set[str]()
        _divide(self._top, names, reached, passed, needed)
        return Cut(frozenset(names), frozenset(passed - needed - names), parameters)

    def _walk(self, loss: Tensor, made: Iterable[_Traced]) -> tuple[set[Node], tuple[int, ...]]:
        """Return the nodes between the loss and the outputs that are made, these included, and the parameters met."""
        stops = {node for call in made for node in call.nodes}
        seen: set[Node] = set()
        parameters: set[int] = set()
        waiting = [loss.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            leaf = getattr(node, "variable", None)
            if leaf is not None and (id(leaf) in self._trained or self._sharded):
                # Gathered parameters are others than the sharded ones.
                parameters.add(self._trained.get(id(leaf), -1))
            if node not in stops:
                waiting += [following for following, _ in node.next_functions]
        return seen, tuple(sorted(parameters))


def _met(calls: Iterable[_Traced], reached: set[Node]) -> list[_Traced]:
    return [call for call in calls if reached.intersection(call.nodes)]


def _outermost(calls: list[_Traced]) -> list[_Traced]:
    """Return the calls without those inside another that has the same output: a container and its last layer."""
    covered = {
        id(inner)
        for call in calls
        for inner in call.all_inside()
        if inner.nodes and set(inner.nodes) <= set(call.nodes)
    }
    return [call for call in calls if id(call) not in covered]


def _divide(call: _Traced, made: set[str], reached: set[Node], passed: set[str], needed: set[str]) -> None:
    """Sort the calls inside one into those that the loss does not need and those that run, down to the ones made."""
    for inner in call.inside:
        if inner.name in made:
            continue
        parts = [inner, *inner.all_inside()]
        if any(part.name in made for part in parts) or any(reached.intersection(part.nodes) for part in parts):
            needed.add(inner.name)
            _divide(inner, made, reached, passed, needed)
        else:
            passed.add(inner.name)


class Replayed(Protocol):
    """What can repeat a recorded step inside a context."""

    @property
    def module(self) -> nn.Module:
        """The module."""

    def evaluate(
        self, record: Any, segment: int = 0, within: contextlib.AbstractContextManager[Any] | None = None
    ) -> Evaluation:
        """Return loss and outputs of the step."""


def find_cut(step: Replayed, record: Any, segment: int, trained: Iterable[Tensor], outputs: str | None) -> Cut:
    """Repeat a step once, at the present parameters and with its graph, and return where to cut its loss.

    Arguments and errors as for :class:`Trace`.
    """
    trace = Trace(step.module, trained)
    with torch.enable_grad(), differentiable():
        loss = step.evaluate(record, segment, within=trace.tracing()).loss
        return trace.cut(loss, outputs)


def head_loss(
    step: Replayed, record: Any, segment: int, cut: Cut, calls: list[Call], outputs: Iterable[Tensor]
) -> Tensor:
    """Return the loss of a step whose calls return other outputs, in the order of :func:`made_outputs`."""
    tensors = iter(outputs)
    given = [
        filled(call.output, tensors) if call.name in cut.made else rebuilt(call.output, Tensor.clone) for call in calls
    ]
    with differentiable():
        return step.evaluate(record, segment, within=replaying_calls(step.module, calls, given)).loss


def made_outputs(cut: Cut, calls: Iterable[Call]) -> list[Tensor]:
    """Return the outputs of recorded calls of which the loss is a function."""
    return [tensor for call in calls if call.name in cut.made for tensor in floating(call.output)]
