"""Checks of states: copies, failures, types, and nothing left on the model."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchmetrics import MetricCollection

from tests.helpers.graphs import Mark, Marked, alive
from tests.testers.metric_case import EARLY, MetricCase, call, feed, numbers, same, states

# What a module does to its submodules in mixed precision, one after the other: each would round the states.
CHANGES = ("half", "float", "bfloat16", "double")


class Switch:
    """A loss that raises while it is off."""

    def __init__(self, loss: Any) -> None:
        self.loss, self.on = loss, True

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        if not self.on:
            raise RuntimeError("no loss")
        return self.loss(outputs, targets)


def train(network: nn.Module) -> None:
    """Stand in for some training."""
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(1.5)


def fail(case: MetricCase, act: Any, loss: Switch) -> None:
    """Call a method with everything that makes it raise."""
    loss.on = False
    for update in case.failing or case.updates[-1:]:
        with pytest.raises((RuntimeError, TypeError, ValueError)):
            call(act, update)
    loss.on = True


def with_graph(update: Any) -> Any:
    """Return the arguments with every number as a tensor that has a gradient."""
    named = update if isinstance(update, dict) else dict(enumerate(update))
    found = {key: torch.as_tensor(value, dtype=torch.float64).clone().requires_grad_() for key, value in named.items()}
    return found if isinstance(update, dict) else tuple(found.values())


class StateChecks:
    """A metric keeps what it has seen, in float64, and leaves everything else alone."""

    def test_reset_forgets(self, case: MetricCase) -> None:
        metric, new = case.fed(case.updates[:EARLY]), case.made()
        metric.compute()
        metric.reset()
        assert same(states(metric), states(new))
        late = case.updates[EARLY:]
        case.assert_value(feed(metric, late).compute(), case.expected(late))
        case.assert_more(case.more(metric), case.more(feed(new, late)))

    def test_copies_go_on_from_where_it_was(self, case: MetricCase) -> None:
        metric, late = case.fed(case.updates[:EARLY]), case.updates[EARLY:]
        early = metric.compute()
        for twin in (metric.clone(), copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
            case.assert_value(twin.compute(), early)
            case.assert_value(feed(twin, late).compute(), case.expected(case.updates))
            case.assert_more(case.more(twin), case.whole_more)
            assert numbers(metric.compute()) == numbers(early)
        case.assert_value(feed(metric, late).compute(), case.expected(case.updates))

    def test_checkpoint_goes_on(self, case: MetricCase) -> None:
        metric, restored = case.fed(case.updates[:EARLY]), case.made()
        for one in (metric, restored):
            one.persistent(True)
        restored.load_state_dict(metric.state_dict())
        case.assert_value(feed(restored, case.updates[EARLY:]).compute(), case.expected(case.updates))

    def test_copies_measure_the_trained_model(self, case: MetricCase) -> None:
        network = case.network() if case.network else nn.Sequential()
        metric = case.made(network)
        copies = [metric, metric.clone(), copy.deepcopy(metric)]
        copies.append(next(iter(MetricCollection([metric]).clone(prefix="train_").values())))
        train(network)
        expected = case.fed(case.updates[:2], network).compute()
        before = case.expected(case.updates[:2])
        assert not torch.allclose(torch.tensor(numbers(expected)), torch.tensor(numbers(before)), rtol=1e-3)
        for one in copies:
            case.assert_value(feed(one, case.updates[:2]).compute(), expected)

    def test_update_that_fails_loses_nothing(self, case: MetricCase) -> None:
        loss = Switch(case.loss)
        metric = feed(case.made(loss=loss), case.updates[:EARLY])
        fail(case, metric.update, loss)
        case.assert_value(feed(metric, case.updates[EARLY:]).compute(), case.expected(case.updates))

    def test_forward_that_fails_loses_nothing(self, case: MetricCase) -> None:
        loss = Switch(case.loss)
        metric = case.made(loss=loss)
        for update in case.updates[:EARLY]:
            call(metric, update)
        fail(case, metric, loss)
        case.assert_value(feed(metric, case.updates[EARLY:]).compute(), case.expected(case.updates))

    def test_update_that_stops_halfway_adds_nothing(self, case: MetricCase) -> None:
        metric = case.fed(case.updates[:EARLY])
        before = states(metric)
        assert case.halting is not None
        with pytest.raises((RuntimeError, ValueError)):
            call(metric.update, case.halting)
        assert same(states(metric), before)

    def test_states_stay_in_float64(self, case: MetricCase) -> None:
        holder = nn.Module()
        holder.metric = case.fed(case.updates[:EARLY])
        before = states(holder.metric)
        for change in CHANGES:
            getattr(holder, change)()
            getattr(holder.metric, change)()
            assert same(states(holder.metric), before), change
        case.assert_value(feed(holder.metric, case.updates[EARLY:]).compute(), case.expected(case.updates))

    def test_states_stay_in_float64_under_to(self, case: MetricCase) -> None:
        holder = nn.Module()
        holder.metric = case.fed(case.updates[:EARLY])
        before = states(holder.metric)
        holder.to("cpu")
        assert same(states(holder.metric), before)
        holder.to(torch.float32)
        assert same(states(holder.metric), before)

    def test_inputs_keep_no_graph(self, case: MetricCase) -> None:
        metric = case.made()
        for update in case.updates[:2]:
            call(metric.update, with_graph(update))
        assert not any(state.requires_grad for state in tree_leaves(metric.metric_state))
        case.assert_value(metric.compute(), case.expected(case.updates[:2]))

    def test_forward_gives_no_graph(self, case: MetricCase) -> None:
        metric = case.made()
        for update in case.updates[:2]:
            assert not call(metric, with_graph(update)).requires_grad
            assert not any(state.requires_grad for state in tree_leaves(metric.metric_state))

    def test_no_graph_is_kept(self, case: MetricCase) -> None:
        assert case.network is not None
        metric = case.made(case.network().append(Mark()))
        Marked.tokens.clear()
        gc.disable()  # a graph in a cycle would stay until the collector comes
        try:
            for update in case.updates[:2]:
                call(metric.update, update)
                assert alive() == 0
            metric.compute()
            assert alive() == 0
            call(metric, case.updates[2])
            assert alive() == 0
            assert Marked.tokens
        finally:
            gc.enable()

    def test_training_is_left_alone(self, case: MetricCase) -> None:
        assert case.network is not None
        network = case.network()
        parameters = list(network.parameters())
        for p in parameters[::2]:
            p.grad = torch.ones_like(p)
        before, random = copy.deepcopy(network.state_dict()), torch.get_rng_state()
        metric = feed(case.made(network), case.updates)
        metric.compute()
        call(metric, case.updates[0])
        assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
        assert all(p.grad is not None and bool((p.grad == 1.0).all()) for p in parameters[::2])
        assert all(p.grad is None for p in parameters[1::2])
        assert torch.equal(torch.get_rng_state(), random)
