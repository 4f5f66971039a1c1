"""What two ranks do with every metric class that the contract describes."""

from __future__ import annotations

from typing import Any

from tests.testers.metric_case import SHARE, MetricCase, call, feed, same, states
from tests.testers.metric_cases import CASES


def seen_by(case: MetricCase, rank: int) -> list[Any]:
    """Updates of a rank: its share, and two more after it has looked, the first two for rank 0, the last for rank 1."""
    return [*case.shares[rank], *(case.updates[:2] if rank == 0 else case.updates[-2:])]


def own_steps(case: MetricCase, rank: int) -> list[Any]:
    """Updates of a rank one after the other, of which each has two."""
    return list(case.updates[2 * rank : 2 * rank + 2])


def contract(rank: int, world_size: int) -> dict[str, Any]:
    """Look, go on with ``forward``, and look another time."""
    found = {}
    for case in CASES:
        share = case.shares[rank]
        metric = feed(case.made(), share)
        own = states(metric)
        result = {"value": metric.compute(), "more": case.more(metric), "kept": same(own, states(metric))}
        result["forward"] = [call(metric, update) for update in seen_by(case, rank)[len(share) :]]
        # Rank 0 alone has seen something, by ``forward``, which waits for nobody.
        lone = case.made()
        for update in case.updates[: SHARE if rank == 0 else 0]:
            call(lone, update)
        result["alone"] = lone.compute()
        step = case.made()
        step.dist_sync_on_step = True
        result["steps"] = [call(step, update) for update in own_steps(case, rank)]
        found[case.name] = result | {"again": metric.compute(), "more again": case.more(metric)}
    return found
