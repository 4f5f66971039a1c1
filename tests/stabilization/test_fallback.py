"""Losses without second derivatives: samples are multiplied by differences of gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_curvature import CurvatureWarning, StabilizationMonitor
from lightning_curvature.stabilization.options import ESTIMATORS, QUANTITIES
from lightning_curvature.stabilization.result import SampleGrowth
from tests.helpers import ctc
from tests.helpers.runs import Classifier, make_trainer


def measured(once: bool, **options: Any) -> SampleGrowth:
    module = Classifier(
        ctc.network(), lambda m: torch.optim.SGD(m.parameters(), lr=0.1), ctc.of_torch if once else ctc.by_hand
    )
    follow = StabilizationMonitor(
        sample_sizes=(2, 5),
        candidates=2,
        subspace_dim=2,
        draws=3,
        sigma=1e-4,
        tolerance=1e-8,
        trace_vectors=3,
        **options,
    )
    return follow.evaluate(
        module, DataLoader(TensorDataset(*ctc.samples(8)), batch_size=4), trainer=make_trainer()
    ).result


@pytest.mark.parametrize("law", ["top", "random"])
@pytest.mark.slow
def test_values_are_those_with_second_derivatives(law: Any) -> None:
    with pytest.warns(CurvatureWarning, match="products with the Hessian are differences of gradients from here on"):
        found = measured(once=True, quantities=QUANTITIES, estimators=ESTIMATORS, law=law)
    exact = measured(once=False, quantities=QUANTITIES, estimators=ESTIMATORS, law=law)
    assert len(found.rows) == len(exact.rows) == 2 * (1 + 2 * len(ESTIMATORS))
    differ = 0
    for row, other in zip(found.rows, exact.rows, strict=True):
        assert (row.k, row.criterion, row.estimator) == (other.k, other.criterion, other.estimator)
        # Products to 1e-9 in float64; those of the losses alone are the same but for rounding.
        assert row.value == pytest.approx(other.value, rel=1e-6)
        differ += row.value != other.value
    assert differ
    # The search for eigenvectors takes as many products, or one more at the edge of its tolerance.
    assert abs(found.products - exact.products) <= 1
