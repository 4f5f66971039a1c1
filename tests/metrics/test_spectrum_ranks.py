"""The metrics that collect batches where ranks differ: in failures, and in what they are to sum over."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_curvature.metrics import HessianEigenvalues
from tests.helpers.processes import run_on_ranks
from tests.helpers.runs import mlp
from tests.helpers.spectrum_metrics import dense, ragged


def reason(metric: HessianEigenvalues) -> str:
    """What ``compute`` raises."""
    try:
        metric.compute()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def on_ranks(rank: int, world_size: int) -> dict[str, Any]:
    """Each has a batch of its own; what fails does so on rank 1 alone."""
    x, y = ragged()[rank]
    network = mlp(4, 5, 3)
    found: dict[str, Any] = {}
    own = HessianEigenvalues(network, F.cross_entropy, tolerance=1e-9, sync_on_compute=False)
    own.update(x, y)
    found["own"] = own.compute()
    uncounted = HessianEigenvalues(network, F.cross_entropy)
    uncounted.update(x, y if rank == 0 else "none")
    found["uncounted"] = reason(uncounted)

    def loss(z: Tensor, targets: Tensor) -> Tensor:
        if rank == 1:
            raise RuntimeError("no loss")
        return F.cross_entropy(z, targets)

    failing = HessianEigenvalues(network, loss)
    failing.update(x, y)
    found["failing"] = reason(failing)
    empty = HessianEigenvalues(network, F.cross_entropy)
    found["empty"] = reason(empty)
    return found


@pytest.fixture(scope="module")
def by_rank() -> list[dict[str, Any]]:
    return run_on_ranks(__name__, ["on_ranks"])["on_ranks"]


def test_batches_of_a_rank_alone(by_rank: list[dict[str, Any]]) -> None:
    for found, batch in zip(by_rank, ragged(), strict=True):
        # Within the residual, 1e-9 of the value.
        expected = torch.linalg.eigvalsh(dense(mlp(4, 5, 3), [batch]))[-1]
        torch.testing.assert_close(found["own"], expected, rtol=2e-9, atol=0.0)


def test_no_rank_waits_for_one_that_fails(by_rank: list[dict[str, Any]]) -> None:
    first, second = by_rank
    assert first["uncounted"] == "RuntimeError: counting the samples failed on another rank; see that rank's log"
    assert second["uncounted"].startswith("ValueError: targets must hold a tensor with the samples along its first")
    assert first["failing"].startswith("NonFiniteProductError: a product with the operator must be finite, got NaN")
    assert second["failing"] == "RuntimeError: no loss"


def test_without_a_batch_on_any_rank(by_rank: list[dict[str, Any]]) -> None:
    for found in by_rank:
        assert found["empty"].startswith(
            "ValueError: batches must be a non-empty sequence of pairs, got []: give a list"
        )
