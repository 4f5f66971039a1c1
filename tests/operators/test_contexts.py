"""Contexts in which something is evaluated: a fault at any line of theirs leaves none of them open."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_curvature.losses.samples import ForbidCollectives
from lightning_curvature.operators import DifferenceHistory, GradientDifferenceOperator, micro_batches
from lightning_curvature.operators.differentiation import differentiable, patched, same_attention
from lightning_curvature.operators.micro_batches import building_graphs
from lightning_curvature.operators.sides import Frozen, Looking, eager
from lightning_curvature.replay.frozen import FrozenBut, Spoiled
from tests.helpers.faults import Fault, Line, Tracer, modes

ATTENTION = nn.MultiheadAttention(4, 1).eval()
CONTEXTS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "differentiable": differentiable,
    "building_graphs": building_graphs,
    "same_attention": lambda: same_attention(ATTENTION),
    "patched": lambda: patched(torch, _weight_norm=max),
    "eager": lambda: eager(Looking()),
    "Looking": Looking,
    "Frozen": lambda: Frozen([]),
    "FrozenBut": lambda: FrozenBut([], {}),
    "Spoiled": lambda: Spoiled([]),
    "ForbidCollectives": ForbidCollectives,
}


def use(make: Callable[[], contextlib.AbstractContextManager[Any]], tracer: Tracer) -> None:
    sys.settrace(tracer)
    try:
        with make(), make() if make is differentiable else contextlib.nullcontext():
            torch.ones(2).relu()
    finally:
        sys.settrace(None)


def visits(tracer: Tracer) -> list[tuple[Line, int]]:
    return [(line, visit) for line, count in tracer.visits.items() for visit in range(1, count + 1)]


@pytest.mark.parametrize("name", CONTEXTS)
def test_a_fault_leaves_nothing_open(name: str) -> None:
    make, before, clean = CONTEXTS[name], modes(), Tracer()
    use(make, clean)
    assert modes() == before
    for at in visits(clean):
        with contextlib.suppress(Fault):
            use(make, Tracer(at))
        assert modes() == before, at


def test_a_fault_in_a_product_by_differences_puts_the_parameters_back() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)).double()
    data = [(torch.ones(1, 2, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64))]
    history, before = DifferenceHistory(distance=1.0), [p.detach().clone() for p in model.parameters()]

    def product(tracer: Tracer) -> None:
        operator = GradientDifferenceOperator(
            micro_batches(model, F.mse_loss, data), list(model.parameters()), history=history
        )
        sys.settrace(tracer)
        try:
            operator(torch.ones(13, dtype=torch.float64))
        finally:
            sys.settrace(None)

    product(clean := Tracer())
    for at in (at for at in visits(clean) if at[0][0].endswith("differences.py")):
        with contextlib.suppress(Fault):
            product(Tracer(at))
        assert all(map(torch.equal, model.parameters(), before)), at
