"""Checks of values: over the union of the updates, on two ranks, merged, and of one update by ``forward``."""

from __future__ import annotations

import functools
from typing import Any

import torch

from tests.helpers.processes import run_on_ranks
from tests.testers.metric_case import EARLY, SHARE, MetricCase, call, numbers
from tests.testers.metric_jobs import own_steps, seen_by


@functools.cache
def on_ranks() -> list[dict[str, Any]]:
    """What the two ranks found, once for all cases."""
    return run_on_ranks("tests.testers.metric_jobs", ["contract"])["contract"]


class ValueChecks:
    """A metric gives the value of everything it has seen, wherever that was."""

    def test_parts_have_other_values(self, case: MetricCase) -> None:
        """No check can pass because a metric forgot or kept too much."""
        updates = case.updates
        parts = [updates, updates[:2], updates[:SHARE], updates[-2:], updates[EARLY:]]
        if case.alone is None:  # otherwise a third update waits for its partner
            parts.append(updates[:EARLY])
        found = [torch.tensor(numbers(case.expected(part))) for part in parts]
        for index, one in enumerate(found):
            for other in found[:index]:
                assert not torch.allclose(one, other, rtol=1e-4, atol=1e-4)
        # Nor because it takes the mean of the values of two ranks.
        halves = [torch.tensor(numbers(case.expected(share))) for share in case.shares]
        assert not torch.allclose(0.5 * (halves[0] + halves[1]), found[0], rtol=1e-4, atol=1e-4)

    def test_value_of_the_union(self, case: MetricCase) -> None:
        metric = case.fed(case.updates)
        assert type(metric) is case.kind
        value, expected = metric.compute(), case.expected(case.updates)
        case.assert_value(value, expected)
        if isinstance(expected, torch.Tensor):
            assert (value.shape, value.dtype, value.requires_grad) == (expected.shape, torch.float64, False)

    def test_two_ranks_equal_one(self, case: MetricCase) -> None:
        for found in on_ranks():
            case.assert_value(found[case.name]["value"], case.together(case.shares))
            # The same bits on both.
            assert numbers(found[case.name]["value"]) == numbers(on_ranks()[0][case.name]["value"])

    def test_each_rank_has_its_own_again_and_looks_another_time(self, case: MetricCase) -> None:
        for found in on_ranks():
            assert found[case.name]["kept"]
            case.assert_value(found[case.name]["again"], case.together([seen_by(case, rank) for rank in range(2)]))

    def test_more_numbers_on_ranks(self, case: MetricCase) -> None:
        later = case.more(case.fed([*seen_by(case, 0), *seen_by(case, 1)]))
        for found in on_ranks():
            case.assert_more(found[case.name]["more"], case.whole_more)
            case.assert_more(found[case.name]["more again"], later)
            # The same bits on both.
            for name, number in found[case.name]["more"].items():
                assert numbers(number) == numbers(on_ranks()[0][case.name]["more"][name])

    def test_forward_on_ranks_is_of_its_own_batch(self, case: MetricCase) -> None:
        for rank, found in enumerate(on_ranks()):
            given, seen = found[case.name]["forward"], seen_by(case, rank)
            for back, value in enumerate(reversed(given)):
                case.assert_value(value, case.after(seen[: len(seen) - back]))

    def test_a_rank_may_have_no_update(self, case: MetricCase) -> None:
        for found in on_ranks():
            case.assert_value(found[case.name]["alone"], case.together([case.updates[:SHARE]]))

    def test_forward_over_ranks(self, case: MetricCase) -> None:
        """With ``dist_sync_on_step`` it gives the value of the updates of all ranks at this step."""
        first, second = (own_steps(case, rank) for rank in range(2))
        for found in on_ranks():
            for index, value in enumerate(found[case.name]["steps"]):
                if case.alone is None:
                    case.assert_value(value, case.together([first[index : index + 1], second[index : index + 1]]))
                elif index:
                    case.assert_value(value, case.together([first, second]))

    def test_merge(self, case: MetricCase) -> None:
        first, second = (case.fed(share) for share in case.shares)
        first.merge_state(second)
        case.assert_value(first.compute(), case.together(case.shares))
        if "more_numbers_on_ranks" not in case.absent:
            case.assert_more(case.more(first), case.whole_more)
        case.assert_value(second.compute(), case.expected(case.shares[1]))

    def test_merge_after_compute(self, case: MetricCase) -> None:
        parts = [case.updates[:2], case.updates[-2:]]
        first, second = (case.fed(part) for part in parts)
        first.compute()
        first.merge_state(second)
        case.assert_value(first.compute(), case.together(parts))

    def test_forward_gives_its_own_update_and_keeps_all(self, case: MetricCase) -> None:
        metric = case.made()
        for index, update in enumerate(case.updates[:SHARE]):
            case.assert_value(call(metric, update), case.after(case.updates[: index + 1]))
        case.assert_value(metric.compute(), case.expected(case.updates[:SHARE]))
        metric.reset()
        late = case.updates[-2:]
        for index, update in enumerate(late):
            case.assert_value(call(metric, update), case.after(late[: index + 1]))
        case.assert_value(metric.compute(), case.expected(late))

    def test_forward_gives_the_form_of_compute(self, case: MetricCase) -> None:
        metric = case.made()
        call(metric, case.updates[0])
        given, value = call(metric, case.updates[1]), metric.compute()
        assert type(given) is type(value)
        if isinstance(value, torch.Tensor):
            assert (given.shape, given.dtype) == (value.shape, value.dtype)

    def test_forward_is_kept_for_logging(self, case: MetricCase) -> None:
        """Lightning's ``self.log`` shows it for the step."""
        metric = case.made()
        for update in case.updates[:2]:
            given = call(metric, update)
            assert metric._forward_cache is given
