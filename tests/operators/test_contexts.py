"""Contexts in which something is evaluated: a fault at any line of theirs leaves none of them open."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_curvature.losses.samples import ForbidCollectives
from lightning_curvature.operators.differentiation import differentiable, patched, same_attention
from lightning_curvature.operators.micro_batches import building_graphs
from lightning_curvature.operators.sides import Frozen, Looking, eager
from lightning_curvature.replay.frozen import FrozenBut, Spoiled
from tests.helpers.faults import Fault, Tracer, modes

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


@pytest.mark.parametrize("name", CONTEXTS)
def test_a_fault_leaves_nothing_open(name: str) -> None:
    make, before, clean = CONTEXTS[name], modes(), Tracer()
    use(make, clean)
    assert modes() == before
    for line, visit in {(line, visit) for line, count in clean.visits.items() for visit in range(1, count + 1)}:
        with contextlib.suppress(Fault):
            use(make, Tracer((line, visit)))
        assert modes() == before, (line, visit)
