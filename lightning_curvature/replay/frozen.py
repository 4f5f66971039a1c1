"""Evaluations of a training step that stay on the sides of its kinks, or note them."""

import operator
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_curvature.distributed.together import attempted
from lightning_curvature.functional.products import graph_nodes
from lightning_curvature.operators.kinks import KINKS
from lightning_curvature.operators.sides import Frozen, Looking, Side, Watching, parts
from lightning_curvature.replay.memory import sums

Node = Any  # of the graph of autograd


class _Saved:
    """What a node of the graph has kept of its operation."""

    _ALSO: ClassVar = {"self": ("result", "self_or_result"), "indices": ("result1",)}

    def __init__(self, node: Node) -> None:
        self._node = node

    def _attribute(self, name: str) -> str | None:
        # Of the class: that of the node would be unpacked.
        known = (f"_saved_{one}" for one in (name, *self._ALSO.get(name, ())))
        return next((one for one in known if hasattr(type(self._node), one)), None)

    def __contains__(self, name: str) -> bool:
        return self._attribute(name) is not None

    def __getitem__(self, name: str) -> Any:
        attribute = self._attribute(name)
        assert attribute is not None
        raw = getattr(self._node, f"_raw{attribute}", None)
        if raw is not None and getattr(raw, "unpack_hook", raw) is not None:
            # Unpacking would run a checkpointed forward again, inside of the user's step.
            raise RuntimeError("the graph is packed")
        return getattr(self._node, attribute)


@torch.no_grad()
def sides_of(losses: Iterable[Tensor]) -> list[Side] | None:
    """Return the sides of a step, in the order of its operations, from its graph; None where the graph is closed."""
    found: list[tuple[int, Side]] = []
    for node in graph_nodes(losses):
        name = node.name().partition("Backward")[0].lower()
        if name == "compiledfunction":  # whatever is in it
            return None
        if name in KINKS:
            saved = _Saved(node)
            try:
                if KINKS[name].applies(saved):
                    found.append((node._sequence_nr(), Side(name, KINKS[name].side(saved))))
            except RuntimeError:  # packed, freed, or written to since
                return None
    return [side for _, side in sorted(found, key=operator.itemgetter(0))]


_Content = list[tuple[int, ...]]


def _content(arguments: dict[str, Any]) -> _Content:
    """Return numbers that tell what an operation was given."""
    return [tuple(sums(one)) for one in arguments.values() if isinstance(one, Tensor)]


class FrozenBut(Frozen):
    """Evaluate kinked operations on given sides, but for some that are left as they are.

    Args:
        sides: those of the others, in their order.
        beside: what the operations were given that are left as they are, by position among all kinked operations; None
            where that does not matter.

    Attributes:
        moved: positions of those that are left as they are and were given something else.
    """

    def __init__(self, sides: Sequence[Side], beside: Mapping[int, _Content | None]) -> None:
        super().__init__(sides)
        self._beside = beside

    def __enter__(self) -> "FrozenBut":
        self._position, self.moved = -1, set[int]()
        return super().__enter__()  # type: ignore[return-value]

    def meet(self, name: str, arguments: dict[str, Any], run: Callable[[], Any]) -> Any:
        """Evaluate it on its side, unless it is left as it is."""
        self._position += 1
        if self._position not in self._beside:
            return super().meet(name, arguments, run)
        before = self._beside[self._position]
        if before is not None and before != _content(arguments):
            self.moved.add(self._position)
        return run()


class Spoiled(Watching):
    """Spoil what operations at some positions return: a loss that stays the same does not depend on them."""

    def __init__(self, positions: Container[int]) -> None:
        super().__init__()
        self._spoiled = positions

    def __enter__(self) -> "Spoiled":
        self._position = -1
        return super().__enter__()

    def meet(self, name: str, arguments: dict[str, Any], run: Callable[[], Any]) -> Any:
        """Spoil its result at some positions."""
        self._position += 1
        result = run()
        if self._position not in self._spoiled:
            return result
        spoiled = [_other(one) for one in parts(result)]
        return spoiled[0] if isinstance(result, Tensor) else spoiled


def _other(result: Tensor) -> Tensor:
    """Return something else, on which a step is not likely to act: finite, and no mask of another kind."""
    if result.dtype == torch.bool:
        return result if bool(result.all()) or not bool(result.any()) else ~result
    return torch.full_like(result, 0.25 if result.is_floating_point() else 0)


class KinkedStep:
    """How the step of a module is evaluated at other parameters: on the sides of its kinks at θ_t, or across them.

    The sides come from the graph of the step itself. Where that does not show all (checkpointing, custom functions,
    compiled code), from a repetition at θ_t, one forward.

    Attributes:
        wanted: "frozen" or "crossed"; None where nobody asks.
        closed: whether there are no sides to be had.
        repeated: whether sides come from repetitions, on all ranks alike.
        lost: whether the graph does not show the sides on this rank, so that later steps are to be repeated.
        smooth: whether there are no kinks that the loss depends on; None until that is known.
    """

    def __init__(self) -> None:
        self.wanted: str | None = None
        self.begin()

    def begin(self) -> None:
        """Forget what was learned of the module."""
        self.repeated = self.lost = self.closed = False
        self.smooth: bool | None = None
        self._shown = 0
        self._beside: dict[int, _Content | None] = {}

    def read(self, losses: Sequence[Tensor]) -> list[Side] | None:
        """Return the sides of a step with the graph of its losses; None where they are not there. Never raises."""
        if self.wanted is None or self.smooth:
            return []
        sides = None if self.repeated or self.closed else attempted(lambda: sides_of(losses), lambda error: None)
        return sides if self.wanted == "frozen" or not sides else None

    def looking(self) -> Looking | None:
        """Return a mode that notes the sides of an evaluation; None where they are not to be had or not wanted."""
        if self.wanted != "frozen" or self.closed or self.smooth:
            return None
        return Looking(_content if self.smooth is None and not self.repeated else None)

    def learn(self, read: Sequence[Side] | None, seen: Looking) -> None:
        """Learn from both kinds of sides of one step whether its graph shows them all."""
        waiting = list(reversed(read or ()))
        self._beside = {}
        for position, (side, content) in enumerate(zip(seen.sides, seen.notes, strict=True)):
            # The same operation on something else has other sides.
            if waiting and waiting[-1].kink == side.kink and torch.equal(waiting[-1].number, side.number):
                waiting.pop()
            else:
                self._beside[position] = content
        self._shown = len(seen.sides) - len(self._beside)
        self.lost = not self.closed and bool(waiting)

    def compared(self, sides: Sequence[Side] | None) -> FrozenBut | None:
        """Return a mode that tells, at other parameters, which of the operations that the graph leaves out move.

        None where it leaves out none.
        """
        return FrozenBut(sides or (), self._beside) if self._beside and not (self.lost or self.closed) else None

    def leave(self) -> None:
        """Leave these operations as they are from now on: they are of data, or beside the loss, unless all is lost."""
        self._beside = dict.fromkeys(self._beside)
        self.smooth = not (self._shown or self.lost or (self.closed and self._beside))

    def on_sides(self, sides: Sequence[Side] | None) -> Frozen | None:
        """Return a mode that evaluates a step on its sides; None where it has none."""
        if not sides:
            return None
        return Frozen(sides) if self.repeated else FrozenBut(sides, self._beside)

    def settle(self, evaluated: Frozen | None) -> None:
        """Learn from an evaluation on the sides of a step.

        Raises:
            ValueError: if its operations were others than those of the step.
        """
        if evaluated is not None and evaluated.other:
            self.closed, self.lost = self.repeated, True
            raise ValueError(
                "a repeated step must make the operations with kinks (relu, max, clamp, …) that it made, got others: "
                "kinks='crossed' evaluates them as they come."
            )
