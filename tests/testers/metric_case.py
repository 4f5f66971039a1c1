"""Descriptions of metric classes, which the tester and the jobs on two ranks read."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path
from torchmetrics import Metric

# Arguments of one ``update``, by position or by name.
Update = tuple[Any, ...] | dict[str, Any]
Value = Any  # a float, a tensor, or a dict of floats

# An odd number of updates, after which a metric that takes pairs keeps the first of one.
EARLY = 3
# Updates of rank 0, or of the metric that takes in another; whole pairs. The others have the rest.
SHARE = 4
UPDATES = 6


@dataclass(frozen=True)
class Mistake:
    """A call with a bad argument, the beginning of the sentence that it raises, and why it does not yet, if so."""

    act: Callable[[], Any]
    sentence: str
    xfail: str = ""


@dataclass(frozen=True, eq=False)
class MetricCase:
    """One public metric class with some options: how it is made and fed, and its value.

    Attributes:
        name: of the case in the names of tests.
        kind: the class.
        make: makes one from network and loss, or from nothing where ``network`` is None.
        updates: six of unequal size.
        reference: value over some updates, from the definition in float64.
        rel, abs: tolerance of values, derived where the case is described.
        network: makes the model, a ``Sequential``; None for metrics without one.
        loss: of the model.
        alone: what ``forward`` of the last of some updates gives; default: the value of that one.
        combined: value of several metrics together, from the updates of each; default: that over all updates.
        more: other numbers that the metric gives by name, which cover what ``compute`` covers.
        more_rel: their tolerance.
        failing: updates that raise; a metric with a model is given a loss that raises.
        halting: an update that raises when it has already begun to add.
        drawn: numbers that ``plot`` shows.
        mistakes: calls with bad arguments.
        absent: checks that do not apply, by name without ``test_``, and why.
        xfails: checks that fail today, and why.
    """

    name: str
    kind: type[Metric]
    make: Callable[..., Any]
    updates: Sequence[Update]
    reference: Callable[[Sequence[Update]], Value]
    rel: float
    abs: float = 0.0
    network: Callable[[], nn.Sequential] | None = None
    loss: Callable[[Any, Any], Tensor] = F.cross_entropy
    alone: Callable[[Sequence[Update]], Value] | None = None
    combined: Callable[[Sequence[Sequence[Update]]], Value] | None = None
    more: Callable[[Any], dict[str, Any]] = lambda metric: {}
    more_rel: float = 0.0
    failing: Sequence[Update] = ()
    halting: Update | None = None
    drawn: Callable[[Value], list[float]] = lambda value: numbers(value)
    mistakes: Sequence[Mistake] = ()
    absent: Mapping[str, str] = field(default_factory=dict)
    xfails: Mapping[str, str] = field(default_factory=dict)

    def made(self, network: nn.Module | None = None, loss: Any = None) -> Any:
        """Return a new metric."""
        if self.network is None:
            return self.make()
        return self.make(self.network() if network is None else network, loss or self.loss)

    def fed(self, updates: Sequence[Update], network: nn.Module | None = None) -> Any:
        """Return a new metric after some updates."""
        return feed(self.made(network), updates)

    @property
    def shares(self) -> list[Sequence[Update]]:
        """Updates of each of two ranks."""
        return [self.updates[:SHARE], self.updates[SHARE:]]

    def expected(self, updates: Sequence[Update]) -> Value:
        """Return the value over some updates, as ``compute`` gives it."""
        return wide(self.reference(updates))

    def after(self, seen: Sequence[Update]) -> Value:
        """Return what ``forward`` of the last of the updates gives."""
        return self.expected(seen[-1:]) if self.alone is None else wide(self.alone(seen))

    def together(self, shares: Sequence[Sequence[Update]]) -> Value:
        """Return the value of several metrics together."""
        if self.combined is not None:
            return wide(self.combined(shares))
        return self.expected([update for share in shares for update in share])

    @functools.cached_property
    def whole_more(self) -> dict[str, Any]:
        """Other numbers of a metric that has seen all updates."""
        return self.more(self.fed(self.updates))

    def assert_value(self, found: Value, expected: Value) -> None:
        """Compare the numbers of a value of the metric with those of the reference."""
        if isinstance(expected, dict):
            assert found == pytest.approx(expected, rel=self.rel, abs=self.abs)
            return
        found = found.reshape(expected.shape)
        torch.testing.assert_close(found, expected, rtol=self.rel, atol=self.abs, equal_nan=True)

    def assert_more(self, found: Any, expected: Any) -> None:
        """Compare the other numbers."""
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(wide(found[name]), wide(value), rtol=self.more_rel, atol=0.0, equal_nan=True)


def call(act: Callable[..., Any], update: Update) -> Any:
    return act(**update) if isinstance(update, dict) else act(*update)


def wide(value: Value) -> Value:
    """Return a number or tensor as a float64 tensor, and a dict as it is."""
    return value if isinstance(value, dict) else torch.as_tensor(value, dtype=torch.float64)


def feed(metric: Any, updates: Sequence[Update]) -> Any:
    """Update the metric, and return it."""
    for update in updates:
        call(metric.update, update)
    return metric


def states(metric: Any) -> dict[str, Tensor]:
    """Return copies of all tensors in the states."""
    kept = {name: getattr(metric, name) for name in metric._defaults}
    return {str(path): leaf.detach().clone() for path, leaf in tree_flatten_with_path(kept)[0]}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether all states have the same type and the same bits."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name].nan_to_num(), other[name].nan_to_num())
        for name in one
    )


def numbers(value: Value) -> list[float]:
    """Return all numbers of a value in order."""
    if isinstance(value, dict):
        return [float(number) for number in value.values()]
    return wide(value).flatten().tolist()
