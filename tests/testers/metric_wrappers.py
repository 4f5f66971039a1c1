"""Checks of what torchmetrics builds around a metric: windows, trackers, bootstraps, sums, and inference mode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map_only
from torchmetrics import MetricTracker
from torchmetrics.wrappers import BootStrapper, Running

from tests.testers.metric_case import MetricCase, Update, call, feed, numbers


def vectors(updates: Sequence[Update]) -> Sequence[Update]:
    """Return updates that can be sampled from: numbers as vectors of all of them, other updates as they are."""
    arguments = [list(one.values() if isinstance(one, dict) else one) for one in updates]
    if not all(isinstance(value, float) for row in arguments for value in row):
        return updates
    columns = [torch.tensor(column, dtype=torch.float64) for column in zip(*arguments, strict=True)]
    return [dict(zip(updates[0], columns, strict=True)) if isinstance(updates[0], dict) else tuple(columns)]


class WrapperChecks:
    """A metric gives its values within torchmetrics' wrappers, and where autograd is off."""

    def test_running_window(self, case: MetricCase) -> None:
        metric, updates = Running(case.made(), 2), case.updates
        for update in updates[:3]:
            call(metric.update, update)
        case.assert_value(metric.compute(), case.together([[one] for one in updates[1:3]]))
        for index in (3, 4):
            case.assert_value(call(metric, updates[index]), case.expected(updates[index : index + 1]))
        case.assert_value(metric.compute(), case.together([[one] for one in updates[3:5]]))

    def test_tracker(self, case: MetricCase) -> None:
        tracker, parts = MetricTracker(case.made(), maximize=False), (case.updates[:2], case.updates[-2:])
        for part in parts:
            tracker.increment()
            feed(tracker, part)
        for index, part in enumerate(parts):
            case.assert_value(tracker[index + 1].compute(), case.expected(part))

    def test_bootstrap(self, case: MetricCase) -> None:
        """Copies see resampled updates: the values scatter about that of all, and the metric itself is a copy, too."""
        torch.manual_seed(0)
        metric = case.made()
        bootstrap = BootStrapper(metric, num_bootstraps=4, raw=True)
        for update in vectors(case.updates):
            call(bootstrap.update, update)
        raw = bootstrap.compute()["raw"]
        assert raw.shape[0] == 4
        assert raw.isfinite().all()
        assert len({tuple(numbers(value)) for value in raw}) == 4
        assert metric.update_count == 0

    def test_composition(self, case: MetricCase) -> None:
        metric = case.made()
        doubled = 2.0 * metric
        for index, update in enumerate(case.updates[:2]):
            case.assert_value(call(doubled, update) / 2.0, case.after(case.updates[: index + 1]))
        case.assert_value(doubled.compute() / 2.0, case.expected(case.updates[:2]))

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_where_gradients_are_off(self, case: MetricCase, mode: Any) -> None:
        """As in a validation step, which makes tensors that autograd refuses."""
        # The references differentiate, too.
        metric, expected = case.made(), [case.after(case.updates[: index + 1]) for index in range(2)]
        with mode():
            updates = tree_map_only(torch.Tensor, torch.clone, list(case.updates[:2]))
            for update, value in zip(updates, expected, strict=True):
                case.assert_value(call(metric, update), value)
            value = metric.compute()
        case.assert_value(value, case.expected(case.updates[:2]))
        case.assert_value(feed(metric, case.updates[2:4]).compute(), case.expected(case.updates[:4]))

    def test_arguments_belong_to_the_caller(self, case: MetricCase) -> None:
        """What is written into them after ``update`` makes no difference."""
        metric = case.made()
        for update in case.updates[:2]:
            own = tree_map_only(torch.Tensor, torch.clone, update)
            call(metric.update, own)
            tree_map_only(torch.Tensor, torch.Tensor.zero_, own)
        case.assert_value(metric.compute(), case.expected(case.updates[:2]))

    def test_each_rank_has_its_own_again_after_an_error(self, case: MetricCase) -> None:
        metric = case.fed(case.updates[:2])
        two = {"dist_sync_fn": lambda tensor, group: [tensor, tensor], "distributed_available": lambda: True}
        with pytest.raises(RuntimeError, match="no value"), metric.sync_context(**two):
            raise RuntimeError("no value")
        case.assert_value(metric.compute(), case.expected(case.updates[:2]))
