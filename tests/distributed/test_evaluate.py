"""Evaluations by hand in two processes are those of one: each by itself, or together by a Trainer of both."""

from __future__ import annotations

import pytest

from tests.distributed import evaluate_jobs as jobs
from tests.helpers.processes import run_on_ranks

# Sums over samples in another order, in searches of some ten products.
ROUNDING = 1e-7


@pytest.mark.slow
def test_two_processes_give_the_values_of_one() -> None:
    results = run_on_ranks(jobs.__name__, ["by_itself", "together"])
    values, count = jobs.by_itself()
    assert count == 0
    # Nobody waits for anybody.
    assert results["by_itself"] == [(values, 0), (values, 0)]
    (first, some), (second, as_many) = results["together"]
    assert first == second
    assert some == as_many > 0
    alone, _ = jobs.together()
    assert first.keys() == alone.keys()
    for key, value in alone.items():
        assert first[key] == pytest.approx(value, rel=ROUNDING, nan_ok=True), key
