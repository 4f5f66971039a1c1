"""Objects are walked once each, nearest first, and their contents put back in place."""

from __future__ import annotations

import functools
import gc
import random
import weakref
from collections import deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lightning_curvature.replay import objects


class Slotted:
    __slots__ = ("empty", "items")

    def __init__(self) -> None:
        self.items = [1]


class Plain:
    def __init__(self) -> None:
        self.items, self.name = [1], "a"


def closure() -> Any:
    held = [1]

    def function(more: Any = ()) -> Any:
        return held, more

    return function


# Makes an object, and gives the list that it holds.
HOLDERS: dict[str, tuple[Any, Any]] = {
    "attribute": (Plain, lambda o: o.items),
    "slot": (Slotted, lambda o: o.items),
    "namespace": (lambda: SimpleNamespace(items=[1]), lambda o: o.items),
    "list": (lambda: [[1]], lambda o: o[0]),
    "tuple": (lambda: ([1],), lambda o: o[0]),
    "dict": (lambda: {"a": [1]}, lambda o: o["a"]),
    "deque": (lambda: deque([[1]]), lambda o: o[0]),
    "closure": (closure, lambda o: o()[0]),
    "partial": (lambda: functools.partial(print, [1]), lambda o: o.args[0]),
}


def visited(root: Any) -> list[tuple[Any, int]]:
    found: list[tuple[Any, int]] = []

    def visit(value: Any, level: int) -> Any:
        found.append((value, level))
        return objects.parts(value)

    objects.walk([root], visit, {})
    return found


@pytest.mark.parametrize("name", HOLDERS)
def test_what_an_object_holds_is_reached_once(name: str) -> None:
    make, held = HOLDERS[name]
    root = make()
    levels = [level for value, level in visited([root, root]) if value is held(root)]
    # A list on level 0, the object on level 1.
    assert len(levels) == 1
    assert levels[0] >= 2


def test_a_circle_ends_and_a_weak_reference_leads_on() -> None:
    one, other = Plain(), Plain()
    one.items.append(other)  # type: ignore[arg-type]
    other.items.append(weakref.ref(one))  # type: ignore[arg-type]
    seen = [value for value, _ in visited(one)]
    assert sum(value is one for value in seen) == sum(value is other for value in seen) == 1


CHANGES: dict[str, tuple[Any, Any, Any]] = {
    "attribute": (Plain, lambda o: setattr(o, "name", "b"), lambda o: o.name == "a"),
    "new attribute": (Plain, lambda o: setattr(o, "more", 1), lambda o: not hasattr(o, "more")),
    "deleted attribute": (Plain, lambda o: delattr(o, "name"), lambda o: list(vars(o)) == ["items", "name"]),
    "slot": (Slotted, lambda o: setattr(o, "items", []), lambda o: o.items == [1]),
    "empty slot": (Slotted, lambda o: setattr(o, "empty", 1), lambda o: not hasattr(o, "empty")),
    "list": (lambda: [1, 2], lambda o: o.append(3), lambda o: o == [1, 2]),
    "order of a list": (lambda: [1, 2], lambda o: o.reverse(), lambda o: o == [1, 2]),
    "full deque": (
        lambda: deque([1, 2], maxlen=2),
        lambda o: o.append(3),
        lambda o: list(o) == [1, 2] and o.maxlen == 2,
    ),
    "set": (lambda: {1}, lambda o: o.add(2), lambda o: o == {1}),
    "dict": (lambda: {"a": 1, "b": 2}, lambda o: o.pop("a"), lambda o: list(o.items()) == [("a", 1), ("b", 2)]),
    "array": (lambda: np.zeros(2), lambda o: o.__setitem__(0, 5.0), lambda o: o.tolist() == [0.0, 0.0]),
    "generator": (
        lambda: torch.Generator().manual_seed(1),
        lambda o: o.manual_seed(2),
        lambda o: o.initial_seed() == 1,
    ),
    "python's generator": (
        lambda: random.Random(1),
        lambda o: o.random(),
        lambda o: o.getstate() == random.Random(1).getstate(),
    ),
    "numpy's generator": (
        lambda: np.random.default_rng(1),
        lambda o: o.random(),
        lambda o: o.bit_generator.state == np.random.default_rng(1).bit_generator.state,
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_contents_are_put_back_into_the_same_object(name: str) -> None:
    make, change, intact = CHANGES[name]
    value = make()
    restorers = objects.contents(value)
    change(value)
    assert not intact(value)
    objects.put_back(restorers)
    assert intact(value)


def test_a_closure_variable_is_put_back() -> None:
    count = 0

    def function() -> int:
        nonlocal count
        count += 1
        return count

    restorers = objects.contents(function)
    assert function() == 1
    objects.put_back(restorers)
    assert function() == 1


def test_entries_that_have_not_changed_are_not_written() -> None:
    class Frozen(dict):  # type: ignore[type-arg]
        def update(self, *args: Any) -> None:
            raise TypeError("frozen")

    frozen = Frozen(a=1)
    objects.put_back([objects.entries(frozen)])
    assert frozen == {"a": 1}


def test_each_is_put_back_where_one_fails_and_the_first_error_is_raised() -> None:
    done: list[int] = []

    def fail(text: str) -> None:
        raise RuntimeError(text)

    restorers = [lambda: done.append(1), lambda: fail("first"), lambda: done.append(2), lambda: fail("second")]
    with pytest.raises(RuntimeError, match="first"):
        objects.put_back(restorers)
    assert done == [1, 2]


def test_only_what_is_asked_for_is_put_back() -> None:
    value = Plain()
    restorers = objects.contents(value, keep=lambda name, _: name == "name")
    value.name, value.items = "b", [9]
    objects.put_back(restorers)
    assert (value.name, value.items) == ("a", [9])


def test_closed_packages_are_not_opened() -> None:
    assert objects.opens(Plain(), objects.STANDARD)
    assert not objects.opens(random.SystemRandom, objects.STANDARD)
    assert objects.opens([], objects.STANDARD)


def test_an_index_of_constants_is_not_walked_over() -> None:
    """Its tuples are known to hold constants alone once the collector has seen them; others are visited."""
    index = [(f"file{i}", i) for i in range(2000)]
    mixed = [*index[:-1], ("last", [1])]
    gc.collect()
    assert len(visited(index)) == 1
    assert any(value == [1] for value, _ in visited(mixed))
    assert len(visited(index[:10])) == 11


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_collector_is_left_as_it_was_after_an_error(enabled: bool) -> None:
    def visit(value: Any, level: int) -> Any:
        assert not gc.isenabled()
        raise RuntimeError("inside a walk")

    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with pytest.raises(RuntimeError, match="inside a walk"):
            objects.walk([[]], visit, {})
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if before else gc.disable)()
