"""A run watched by NoiseCovarianceMonitor that one process, or two together, make of the same data, and its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from lightning_curvature import NoiseCovarianceMonitor
from lightning_curvature.noise.options import QUANTITIES
from lightning_curvature.noise.result import NoiseCurvature
from tests.distributed.occasional_cases import OccasionalCase, Outcome


class NoiseCase(OccasionalCase):
    """A run that NoiseCovarianceMonitor watches."""

    def kind(self) -> type[NoiseCovarianceMonitor]:
        return NoiseCovarianceMonitor

    def own_options(self) -> dict[str, Any]:
        """All quantities, of micro-batches that are the same on any number of ranks."""
        return {
            "parameter": "network.0.weight",
            "quantities": QUANTITIES,
            "every_n_train_steps": 1,
            "micro_batch_size": 6,
            "haar_draws": 2,
        }


def assert_same_result(found: NoiseCurvature | None, alone: NoiseCurvature | None, tolerance: float) -> None:
    """C, H and what duality makes of them; vectors of nearly equal eigenvalues may be any of their plane."""
    assert found is not None
    assert alone is not None
    assert (found.route, found.samples, found.batch_size) == (alone.route, alone.samples, alone.batch_size)
    for name in ("curvatures", "variances", "second_moments"):
        one, other = getattr(found, name), getattr(alone, name)
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=0.0, atol=tolerance * float(other.abs().max()))
    assert found.chain.keys() == alone.chain.keys()
    for name, link in alone.chain.items():
        assert found.chain[name].norm == pytest.approx(link.norm, rel=tolerance), name
        assert found.chain[name].distance == pytest.approx(link.distance, rel=tolerance), name
    assert found.weight_variance == pytest.approx(alone.weight_variance, rel=tolerance, nan_ok=True)
    assert found.unpaired == pytest.approx(alone.unpaired, abs=1e-12)


def assert_same_noise(together: Sequence[Outcome], alone: Outcome, tolerance: float) -> None:
    """All results, and all that is logged of them; both ranks have the same bits."""
    for outcome in together:
        assert len(outcome.results) == len(alone.results) > 0
        for found, expected in zip(outcome.results, alone.results, strict=True):
            assert_same_result(found, expected, tolerance)
        assert list(outcome.rows) == list(alone.rows)
        for step, row in alone.rows.items():
            assert outcome.rows[step].keys() == row.keys()
            for key, value in row.items():
                assert outcome.rows[step][key] == pytest.approx(value, rel=1e-7, abs=1e-10, nan_ok=True), key
    assert repr(together[0].rows) == repr(together[1].rows)
