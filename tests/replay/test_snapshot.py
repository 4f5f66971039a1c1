"""What a block writes is put back into the same objects, bit for bit, with version counters, also after an error."""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
import threading
import types
import weakref
from collections import OrderedDict, UserDict, defaultdict, deque
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_curvature.replay.snapshot import Snapshot, restored


class Slotted:
    __slots__ = ("__hidden", "__weakref__", "absent", "tensor")

    def __init__(self) -> None:
        self.tensor, self.__hidden = torch.ones(2), 1

    def move(self) -> None:
        self.__hidden += 1
        self.absent = self.__hidden
        self.tensor.add_(1.0)


def counter() -> Any:
    count, values = 0, [torch.zeros(1)]

    def advance(step: list[int] = [1]) -> list[Any]:  # noqa: B006 - a default that is written
        nonlocal count
        count += 1
        step.append(count)
        values.append(values[0].add_(1.0))
        advance.calls = count  # type: ignore[attr-defined]
        return [count, *step, *(v.item() for v in values)]

    return advance


class Everything:
    """One of each kind of object that can hold a state."""

    def __init__(self) -> None:
        self.leaf = nn.Parameter(torch.tensor([1.0, float("nan"), -0.0]))
        self.leaf.grad = torch.ones(3)
        self.flat = torch.arange(6.0)
        self.views = [self.flat[:3], self.flat[3:].view(3, 1), self.flat[:1].expand(5)]
        self.empty, self.whole, self.half = torch.zeros(0), torch.arange(3), torch.ones(2, dtype=torch.bfloat16)
        self.sparse = torch.eye(3).to_sparse()
        with torch.inference_mode():
            self.inference = torch.ones(2)
        self.state: Any = defaultdict(dict, {self.leaf: {"step": torch.zeros(())}})
        self.ordered, self.queue, self.names = OrderedDict(a=1, b=[2]), deque([1, 2], maxlen=2), {"a"}
        self.pair = ([1], frozenset({2}), types.SimpleNamespace(count=0))
        self.slotted, self.count, self.partial = Slotted(), counter(), functools.partial(list.append, [1])
        self.method, self.weak = self.slotted.move, weakref.ref(self.slotted)
        self.generators = [torch.Generator(), random.Random(1), np.random.default_rng(1), np.random.RandomState(1)]
        self.array, self.constant = np.zeros(3), np.broadcast_to(np.zeros(1), 3)
        self.module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.numbers, self.held = itertools.count(), [itertools.count()]
        self.user: Any = UserDict({"leaf": self.leaf, "count": 0})
        self.me = self

    def disturb(self) -> None:
        with torch.no_grad():
            self.leaf.add_(1.0)
            self.leaf.note = 1  # type: ignore[attr-defined]
            self.views[1].mul_(3.0)
            self.whole.add_(1)
            self.half.add_(1.0)
            self.sparse.mul_(2.0)
            self.state[self.leaf]["step"] += 1
        self.leaf.data = torch.zeros(7)
        self.leaf.requires_grad_(False)
        self.leaf.grad = None
        self.flat.mul_(2.0)
        self.views.pop()
        with torch.inference_mode():
            self.inference.add_(1.0)
        self.state[self.whole]["new"] = self.state.pop(self.leaf)
        self.ordered.move_to_end("a")
        self.ordered["b"].append(3)
        self.queue.append(3)
        self.names |= {"b", "c"}
        self.pair[0].append(2)
        self.pair[2].count += 1
        self.method()
        self.count()
        self.partial(2)
        torch.rand(1, generator=self.generators[0])
        self.generators[1].random(), self.generators[2].random(), self.generators[3].rand()
        self.array += 1.0
        self.module(torch.randn(4, 2)).sum().backward()
        self.module.eval()
        next(self.numbers), next(self.held[0])
        self.user["count"] += 1
        del self.array
        self.added = 1


def seen(value: Any, known: dict[int, Any]) -> Any:
    """Tell everything there is to tell of an object by another way than the code does."""
    if id(value) in known or isinstance(value, type):
        return id(value)
    known[id(value)] = value
    mark: list[Any] = [id(value), type(value)]
    if isinstance(value, Tensor):
        version = None if value.is_inference() else value._version
        plain = value.detach().to_dense().contiguous().reshape(-1)
        mark += [version, value.requires_grad, value.is_leaf, value.shape, seen(value.grad, known), vars(value)]
        mark += [plain.view(torch.uint8).tolist(), 0 if value.is_sparse else value.data_ptr()]
    elif isinstance(value, torch.Generator):
        mark.append(value.get_state().tolist())
    elif isinstance(value, random.Random):
        mark.append(value.getstate())
    elif isinstance(value, np.random.Generator):
        mark.append(str(value.bit_generator.state))
    elif isinstance(value, np.random.RandomState):
        mark.append(str(value.get_state()))
    elif isinstance(value, np.ndarray):
        mark.append(value.tolist())
    elif isinstance(value, Slotted):
        mark += [seen(value.tensor, known), value._Slotted__hidden, hasattr(value, "absent")]  # type: ignore[attr-defined]
    elif isinstance(value, types.FunctionType):
        mark += [seen(c.cell_contents, known) for c in value.__closure__ or ()]
        mark += [seen(value.__defaults__, known), dict(vars(value))]
    elif isinstance(value, functools.partial):
        mark.append(seen(value.args, known))
    elif isinstance(value, dict):
        mark += [(seen(key, known), seen(one, known)) for key, one in value.items()]
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        mark += [seen(one, known) for one in value]
    elif isinstance(value, itertools.count):
        mark.append(repr(value))
    elif isinstance(value, (int, float, str)):
        mark.append(value)
    elif isinstance(getattr(value, "__dict__", None), dict):
        mark += [(name, seen(one, known)) for name, one in vars(value).items()]
    return mark


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_everything_comes_back(error: type[BaseException] | None) -> None:
    everything = Everything()
    keep: dict[int, Any] = {}
    before = seen(everything, keep)
    for _ in range(2):
        expected = pytest.raises(error) if error is not None else contextlib.nullcontext()
        with expected, restored([everything]):
            everything.disturb()
            assert seen(everything, {}) != before
            if error is not None:
                raise error
        assert seen(everything, {}) == before
    assert everything.count() == counter()()


def test_graphs_that_have_saved_a_tensor_stay_valid() -> None:
    leaf, factor = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([3.0, 4.0])
    value = (factor * leaf**3).sum()
    with restored([leaf, factor]), torch.no_grad():
        leaf.mul_(5.0)
        factor.zero_()
    assert torch.autograd.grad(value, leaf)[0].tolist() == [9.0, 48.0]


def test_memory_that_was_freed_is_filled_again() -> None:
    tensor = torch.arange(4.0)
    views = [tensor[:2], tensor[2:]]
    with restored([tensor, views]):
        tensor.untyped_storage().resize_(0)
    assert [tensor.tolist(), views[1].tolist()] == [[0.0, 1.0, 2.0, 3.0], [2.0, 3.0]]


def test_a_state_that_a_step_ties_to_a_graph_is_a_leaf_again() -> None:
    leaf, momentum = torch.ones(2, requires_grad=True), torch.zeros(2)
    with restored([leaf, momentum]):
        momentum.add_(leaf)
        assert not momentum.is_leaf
    assert momentum.is_leaf
    assert not momentum.requires_grad
    assert momentum.tolist() == [0.0, 0.0]


def test_what_the_block_does_not_write_is_not_copied() -> None:
    spared = torch.zeros(2)
    with restored([[spared]], passed=[spared]):
        spared.add_(1.0)
    assert spared.tolist() == [1.0, 1.0]


def test_what_can_neither_be_written_nor_copied_is_named() -> None:
    holder = {"tensor": torch.zeros(1), "lock": threading.Lock()}
    with pytest.raises(TypeError, match=r"cannot pickle '_thread\.lock'"), restored([holder]):
        raise AssertionError
    assert list(holder) == ["tensor", "lock"]


def test_each_part_is_put_back_though_one_fails() -> None:
    first, stubborn, last = torch.zeros(1), np.zeros(1), [1]
    with pytest.raises(ValueError, match="read-only"), restored([first, stubborn, last]):
        first.add_(1.0)
        stubborn[0] = 1.0
        stubborn.flags.writeable = False
        last.append(2)
    assert (first.item(), last) == (0.0, [1])


def test_what_refuses_to_be_written_is_left_alone_where_it_has_not_changed() -> None:
    class Frozen(dict):  # type: ignore[type-arg]
        def update(self, *args: Any) -> None:
            raise TypeError("frozen")

        __setitem__ = __delitem__ = clear = pop = update  # type: ignore[assignment]

    with restored([Frozen(a=[1])]):
        pass


@pytest.mark.parametrize("value", [[1], (1,), None, {"a": [1]}])
def test_an_attribute_that_is_named_like_a_table_of_hooks(value: Any) -> None:
    module = nn.Linear(2, 2)
    module.my_hooks = value
    with restored([module]):
        module.my_hooks = 2
    assert module.my_hooks is value
    state = Snapshot([module], whole=False)
    if isinstance(value, list):
        value.append(2)
        state.restore()
        assert value == [1]


def test_a_table_of_parameters_that_others_hold_too_stays_as_it_was_replaced() -> None:
    """A step that is repeated computes with the parameters that a measurement has put there."""
    module = nn.Linear(2, 2)
    module.held = [module._parameters]  # type: ignore[assignment]
    before, replacement = module.weight, torch.zeros(2, 2)
    state = Snapshot([nn.Sequential(module)], whole=False)
    module._parameters["weight"] = replacement  # type: ignore[assignment]
    state.restore()
    assert module._parameters["weight"] is replacement
    module._parameters["weight"] = before


def test_empty_holders_of_a_module_are_emptied_in_the_state_of_a_step() -> None:
    """All but tables of hooks, which a measurement replaces itself."""
    module = nn.Identity()
    module.seen, module.own_hooks, module.entries = {}, set(), OrderedDict()
    state = Snapshot([module], whole=False)
    handle = module.register_forward_hook(lambda *args: None)
    module.seen["a"] = module.entries["a"] = 1
    module.own_hooks.add(1)
    module.weight = nn.Parameter(torch.ones(1))
    state.restore()
    assert not any([module.seen, module.own_hooks, module.entries, module._parameters])
    assert handle.id in module._forward_hooks
