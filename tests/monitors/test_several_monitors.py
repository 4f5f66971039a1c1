"""Monitors beside each other record one and the same step, and leave nothing on the module."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_curvature import DirectionalCurvatureMonitor
from tests.helpers.runs import Batch, Classifier, classification, mlp, run
from tests.oracles.along_step import rows_of


class WithoutIndex(Classifier):
    """Lightning reads from the signature that this step takes no ``batch_idx``."""

    def training_step(self, batch: Batch) -> Tensor:  # type: ignore[override]
        return self.loss(self(batch[0]), batch[1])


@pytest.mark.parametrize("kind", [Classifier, WithoutIndex])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_three_monitors_see_what_one_sees(kind: type[Classifier], accumulate: int) -> None:
    def fit(*prefixes: str) -> dict[str, list[dict[str, float]]]:
        monitors = [
            DirectionalCurvatureMonitor(prefix=prefix, every_n_train_steps=1 + i, on_error="raise")
            for i, prefix in enumerate(prefixes)
        ]
        module = kind(mlp(4, 6, 3), lambda m: torch.optim.SGD(m.parameters(), lr=0.2, momentum=0.5))
        outcome = run(module, classification(6 * accumulate), *monitors, accumulate_grad_batches=accumulate)
        assert "training_step" not in vars(module)
        assert "forward" not in vars(module)
        return {prefix: rows_of(outcome, prefix) for prefix in prefixes}

    alone, beside = fit("a")["a"], fit("a", "b", "c")
    assert [len(rows) for rows in beside.values()] == [6, 3, 2]
    assert beside["a"] == alone
    for prefix, every in (("b", 2), ("c", 3)):
        assert [row["descent"] for row in beside[prefix]] == [row["descent"] for row in alone[::every]]
