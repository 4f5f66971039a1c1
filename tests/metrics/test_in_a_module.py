"""Metrics as attributes of a LightningModule, fed in its steps and logged by it."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_curvature.metrics import BatchSharpness, HessianEigenvalues, HessianTrace
from tests.helpers.runs import make_trainer, mlp
from tests.helpers.spectrum_metrics import dense, ragged
from tests.oracles.matrices import Matrices


class Watched(pl.LightningModule):
    """Logs the metric of the training step, and those of all validation data."""

    def __init__(self) -> None:
        super().__init__()
        self.network = mlp(4, 5, 3)
        self.top = HessianEigenvalues(self.network, F.cross_entropy, tolerance=1e-9)
        self.trace = HessianTrace(self.network, F.cross_entropy, relative_error=1e-6)
        self.sharpness = BatchSharpness(self.network, F.cross_entropy)
        self.at_steps: list[float] = []
        self.modes: set[bool] = set()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        # At the parameters before the step.
        dense_of = Matrices(self.network, F.cross_entropy)
        gradient, hessian = dense_of.gradient([batch]), dense_of.hessian([batch])
        self.at_steps.append(float(gradient @ hessian @ gradient / gradient.square().sum()))
        self.sharpness(*batch)
        self.log("sharpness", self.sharpness, on_step=True, on_epoch=True)
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.modes.add(torch.is_inference_mode_enabled())
        self.top.update(*batch)
        self.trace(*batch)
        self.log("top", self.top)
        self.log("trace", self.trace, on_step=False, on_epoch=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.network.parameters(), lr=0.1)


def test_values_at_steps_and_of_epochs() -> None:
    module, batches = Watched(), ragged()
    data = TensorDataset(*(torch.cat(parts) for parts in zip(*batches, strict=True)))
    trainer = make_trainer(max_epochs=2, inference_mode=True, limit_val_batches=1.0, num_sanity_val_steps=0)
    trainer.fit(module, DataLoader(data, batch_size=4), DataLoader(data, batch_size=4))
    logged, matrix = dict(trainer.callback_metrics), dense(module.network, batches)
    # Within fit by no_grad, by itself in inference mode.
    validated = trainer.validate(module, DataLoader(data, batch_size=4), verbose=False)[0]
    assert module.modes == {False, True}
    # Lightning keeps values in float32.
    single = {"rel": 2.0**-23}
    for found in (logged, validated):
        assert float(found["top"]) == pytest.approx(float(torch.linalg.eigvalsh(matrix)[-1]), **single)
        assert float(found["trace"]) == pytest.approx(float(matrix.trace()), **single)
    steps = module.at_steps
    assert float(logged["sharpness_step"]) == pytest.approx(steps[-1], **single)
    late = steps[len(steps) // 2 :]
    assert float(logged["sharpness_epoch"]) == pytest.approx(sum(late) / len(late), **single)
