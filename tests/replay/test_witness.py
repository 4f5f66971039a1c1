"""A second look says by name what is not as it was."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from torch import nn

from lightning_curvature.replay.witness import Witness


class Slotted:
    __slots__ = ("inner",)

    def __init__(self) -> None:
        self.inner = [torch.zeros(2)]


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("mean", torch.zeros(2))
        self.slotted, self.count, self.raw = Slotted(), 10**9, bytearray(2)
        self.array, self.numbers = np.zeros(2), np.random.default_rng(1)
        self.random, self.generator = random.Random(1), torch.Generator()
        self.metric = {"of": [torchmetrics.MeanMetric()]}
        self.record = [torch.zeros(1) for _ in range(5)]


CHANGES: dict[str, Callable[[Any], object]] = {
    "layer.weight": lambda m: m.layer.weight.data.add_(1.0),
    "mean": lambda m: setattr(m.mean, "data", torch.ones(2)),
    "slotted.inner": lambda m: m.slotted.inner.append(1),
    "count": lambda m: setattr(m, "count", m.count + 1),
    "raw": lambda m: m.raw.append(1),
    "array": lambda m: m.array.__setitem__(0, 1.0),
    "numbers": lambda m: m.numbers.random(),
    "random": lambda m: m.random.random(),
    "generator": lambda m: torch.rand(1, generator=m.generator),
    "metric": lambda m: m.metric["of"][0].update(1.0),
    "record": lambda m: m.record[3].add_(1.0),
    "training": lambda m: m.layer.eval(),
    "new": lambda m: setattr(m, "new", 1),
    "weight.note": lambda m: setattr(m.layer.weight, "note", 1),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen(name: str) -> None:
    module = Everything()
    witness = Witness([module])
    assert witness.differences() == []
    CHANGES[name](module)
    assert len(witness.differences()) >= 1


@pytest.mark.parametrize("count", range(4, 24))
def test_another_layout_of_the_same_attributes_is_no_change(count: int) -> None:
    """Python keeps attributes of a class's instances by one table, until one instance has others."""

    class Gate(nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner
            for index in range(count):
                setattr(self, f"attribute_{index}", 1.5 * index)

    module = nn.Sequential(Gate(nn.Dropout(0.1)), Gate(None))
    witness = Witness([module])
    for gate in module:
        gate.forward = lambda x: x
        del gate.forward
    assert witness.differences() == []


def test_it_is_named() -> None:
    module = Everything()
    witness = Witness([module])
    module.raw.append(1)
    module.layer.weight.data.add_(1.0)
    assert sorted(witness.differences()) == ["_modules.layer._parameters.weight", "raw"]
