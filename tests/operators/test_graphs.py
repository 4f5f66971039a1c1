"""Kept graphs: how many forwards they spare, how many are kept, what they hold, and that they are let go."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_curvature.operators import GaussNewtonOperator, HessianOperator, SecondMomentOperator, graphs
from lightning_curvature.operators.memory import SavedBytes, available_memory
from lightning_curvature.operators.micro_batches import building_graphs
from tests.helpers.graphs import Mark, Marked, alive
from tests.helpers.operators import CASES, Counter, matrix, trained

KINDS = [HessianOperator, GaussNewtonOperator]
SIZES = (3, 3, 2, 1, 1)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.thinned(6)
def test_products_are_the_same_bits_with_and_without_kept_graphs(kind: Any, name: str) -> None:
    case = CASES[name]
    network, data = case.network(), case.data(*SIZES[:3])
    found = [matrix(kind.of(network, case.loss, data, keep_graph=keep)) for keep in (True, False, "auto")]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    ("keep", "sizes", "counts"),
    [
        (True, SIZES, [5, 5, 5]),
        ("auto", SIZES, [5, 5, 5]),
        (False, SIZES, [5, 10, 15]),
        (False, (10,), [1, 1, 1]),  # the only graph is alive in every product
    ],
    ids=["kept", "auto", "not kept", "one micro-batch"],
)
@pytest.mark.parametrize("kind", [*KINDS, SecondMomentOperator])
def test_forwards_of_three_products(kind: Any, keep: Any, sizes: tuple[int, ...], counts: list[int]) -> None:
    case = CASES["perceptron"]
    network = case.network()
    counter = Counter(network)
    options = {"lr": 0.1} if kind is SecondMomentOperator else {}
    operator = kind.of(network, case.loss, case.data(*sizes), keep_graph=keep, **options)
    found = []
    for _ in counts:
        operator(torch.ones(operator.space.size, dtype=torch.float64))
        found.append(counter.count)
    # The second moment multiplies twice with each mini-batch, which without a kept graph is built twice.
    twice = kind is SecondMomentOperator and not keep and len(sizes) > 1
    assert found == [count * (1 + twice) for count in counts]


class Small(nn.Module):
    """z = Wx, of which all that is saved can be written down."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.mT


SMALL = [(torch.ones(4, 3, dtype=torch.float64), torch.ones(4, 2, dtype=torch.float64)) for _ in range(5)]
# Inputs 4×3, outputs 4×2, targets 4×2 and the 1 from which the backward starts, 8 bytes each.
SMALL_BYTES = (12 + 8 + 8 + 1) * 8
# A kept graph also holds its gradient, 2×3.
SMALL_GRAPH = SMALL_BYTES + 6 * 8


def test_bytes_of_a_graph_that_can_be_counted_by_hand() -> None:
    network, (x, y) = Small(), SMALL[0]
    saved = SavedBytes(network.parameters())
    with saved.counting():
        torch.autograd.grad(F.mse_loss(network(x), y), list(network.parameters()), create_graph=True)
    assert saved.count == SMALL_BYTES


def nodes(tensors: list[Tensor]) -> Iterator[Any]:
    """All nodes of a graph."""
    seen, waiting = set(), [t.grad_fn for t in tensors]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
            yield node


@pytest.mark.parametrize("name", CASES)
def test_bytes_of_a_graph_against_a_walk_through_its_nodes(name: str) -> None:
    case = CASES[name]
    network, ((x, y),) = case.network(), case.data(10)

    def build() -> list[Tensor]:
        with building_graphs():
            loss = case.loss(network(x), y)
            found = torch.autograd.grad(loss, trained(network), create_graph=True, allow_unused=True)
        # The loss, too: what it alone saves, a number or a mask, was there while the graph was built.
        return [loss, *(g for g in found if g is not None)]

    graph = build()
    storages: dict[int, int] = {}
    for node in nodes(graph):
        for attribute in dir(node):
            value = getattr(node, attribute) if attribute.startswith("_saved_") else None
            for tensor in value if isinstance(value, tuple) else [value]:
                if isinstance(tensor, Tensor):
                    storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    for p in trained(network):
        storages.pop(p.untyped_storage().data_ptr(), None)
    saved = SavedBytes(trained(network))
    with saved.counting():
        again = build()
    assert len(again) == len(graph)
    assert saved.count == sum(storages.values()) > 0


@pytest.mark.parametrize("kept", [0, 1, 2, 4, 5])
@pytest.mark.parametrize("processes", [1, 2])
def test_as_many_graphs_as_fit_into_half_of_the_memory(
    kept: int, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With the first graph counted as free memory, (free + 1 graph) / 2 is to hold so many.
    free = (2 * kept - 1) * SMALL_GRAPH * processes

    def forwards(available: int) -> list[int]:
        monkeypatch.setattr(graphs, "available_memory", lambda device, processes: available // processes)
        network = Small()
        counter, found = Counter(network), []
        operator = HessianOperator.of(network, F.mse_loss, SMALL, processes=processes)
        for _ in range(3):
            operator(torch.ones(6, dtype=torch.float64))
            found.append(counter.count)
        return found

    assert forwards(max(free, 0)) == [5, 5 + (5 - kept), 5 + 2 * (5 - kept)]
    if kept:
        # One byte less for each process.
        assert forwards(free - processes) == [5, 5 + (6 - kept), 5 + 2 * (6 - kept)]


@pytest.mark.parametrize(("room", "kept"), [(0, []), (2, [1, 3]), (4, [0, 1]), (7, [0, 1, 3]), (9, [0, 1, 2, 3])])
def test_each_graph_counts_with_its_own_bytes(room: int, kept: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Micro-batches of 3, 1, 4 and 1 rows: those are kept, in order, that fit into what is left."""
    held = torch.ones(64)
    sizes = [3, 1, 4, 1]
    row = 256

    def build(index: int) -> tuple[Tensor | None, ...]:
        return (torch.ones(sizes[index] * row // 4), None)

    # The first is there when the memory is read: with it, half of the memory is ``room`` rows.
    monkeypatch.setattr(graphs, "available_memory", lambda device, processes: (2 * room - sizes[0]) * row)
    one: graphs.Graphs[Any] = graphs.Graphs(len(sizes), "auto", [held])
    for _ in range(2):
        for index in range(len(sizes)):
            one.get(index, build)
        assert [index for index in range(len(sizes)) if one.keeps(index)] == kept
    said = f"keep_graph='auto' keeps the gradient graphs of {len(kept)} of 4 micro-batches"
    assert one.left_out.startswith(said) if len(kept) < 4 else one.left_out == ""
    # The next operator, or new parameters, find the memory as it is then.
    monkeypatch.setattr(graphs, "available_memory", lambda device, processes: 100 * row)
    held.add_(1.0)
    for index in range(len(sizes)):
        one.get(index, build)
    assert all(one.keeps(index) for index in range(len(sizes)))
    assert one.left_out == ""


@pytest.mark.parametrize(("keep", "kept"), [(True, 4), (False, 0)])
def test_memory_is_not_asked_for_without_auto(keep: Any, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*args: Any) -> int:
        raise AssertionError

    monkeypatch.setattr(graphs, "available_memory", asked)
    one: graphs.Graphs[Tensor] = graphs.Graphs(4, keep, [torch.ones(1)])
    for index in range(4):
        one.get(index, lambda index: torch.ones(1))
    assert sum(map(one.keeps, range(4))) == kept
    assert one.left_out == ""


# All that saves its own output, a view, or a scalar; each could close a circle.
NETWORK = [nn.Linear(4, 5), nn.Tanh(), nn.Sigmoid(), nn.Linear(5, 3), nn.LayerNorm(3), nn.ELU(), Mark(), nn.Softmax(-1)]


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize(("keep", "after"), [(True, 5), ("auto", 5), (False, 0)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.thinned(5)
def test_graphs_go_when_the_operator_is_closed_without_a_collector(kind: Any, keep: Any, after: int) -> None:
    network, case = nn.Sequential(*NETWORK).double(), CASES["perceptron"]
    operator = kind.of(network, case.loss, case.data(*SIZES), keep_graph=keep)
    for _ in range(2):
        operator(torch.ones(operator.space.size, dtype=torch.float64))
        assert alive() == after
    operator.close()
    assert alive() == 0
    assert len(Marked.tokens) == (5 if keep else 10)


def test_a_closed_operator_builds_its_graphs_again() -> None:
    case = CASES["perceptron"]
    network = case.network()
    counter = Counter(network)
    operator = HessianOperator.of(network, case.loss, case.data(*SIZES))
    vector = torch.ones(operator.space.size, dtype=torch.float64)
    first = operator(vector)
    operator.close()
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(0.5)
    # Not the product at the parameters of the kept graph.
    again = operator(vector)
    assert counter.count == 10
    assert torch.equal(again, HessianOperator.of(network, case.loss, case.data(*SIZES))(vector))
    assert not torch.equal(again, first)


def test_the_memory_of_the_machine_is_a_number_of_bytes() -> None:
    assert 2**20 < available_memory(torch.device("cpu")) < 2**50
