"""Every metric class against its description: see tests/testers/metric.py for the checks."""

from __future__ import annotations

from lightning_curvature import metrics
from tests.testers.metric import MetricTester
from tests.testers.metric_cases import CASES


class TestContract(MetricTester):
    cases = CASES


def test_every_public_class_is_described() -> None:
    assert {case.kind.__name__ for case in CASES} == set(metrics.__all__)
    assert len({case.name for case in CASES}) == len(CASES)
