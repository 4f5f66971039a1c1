"""Draws follow from the step and the seed, and from nothing that an earlier fit has left."""

from __future__ import annotations

from typing import Any

import pytest
from torch.utils.data import DataLoader, TensorDataset

from lightning_curvature.batch_sharpness.options import QUANTITIES
from tests.helpers.batch_sharpness import learner, monitor, samples
from tests.helpers.runs import Capture, make_trainer, rows


def run(follow: Any, scale: float = 1.0) -> dict[int, dict[str, float]]:
    capture, (x, y) = Capture(), samples()
    data = DataLoader(TensorDataset(x * scale, y), batch_size=4)
    make_trainer(follow, logger=capture).fit(learner(), data)
    return rows(capture)


@pytest.mark.slow
def test_other_draws_at_other_steps_and_with_other_seeds() -> None:
    options: dict[str, Any] = {"num_batches": 4, "every_n_train_steps": 1}
    one, other, again = (run(monitor(*QUANTITIES, seed=seed, **options)) for seed in (0, 1, 0))
    assert list(one) == list(other) == [0, 1, 2, 3]
    # The step's own batch is none of the draws.
    assert one[0]["step_sharpness"] == other[0]["step_sharpness"]
    assert one[0]["batch_sharpness"] != other[0]["batch_sharpness"]
    assert str(again) == str(one)


def test_a_monitor_in_a_second_fit_begins_anew() -> None:
    follow, anew = (monitor(*QUANTITIES, num_batches=4) for _ in range(2))
    first = run(follow)
    second = run(follow, scale=2.0)
    assert str(second) == str(run(anew, scale=2.0))
    assert str(first) != str(second)
