"""The transfer of a probe batch to the device: the hooks of training, on a copy, with the same draws each time."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_curvature.data.probe_set import read_probe_set, to_device
from tests.helpers.runs import make_trainer


class Hooked(pl.LightningModule):
    """Hooks that convert, write in place and draw."""

    def __init__(self, sets: list[Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.sets = sets

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.weight * batch_idx

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch.mul_(10)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return super().transfer_batch_to_device(batch, device, dataloader_idx).add_(1)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return torch.stack([batch, torch.rand(batch.shape, dtype=batch.dtype)])

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            state = torch.get_rng_state()
            probes = read_probe_set(self.trainer, samples=None)
            moved = [to_device(self.trainer, self, probe) for probe in probes.batches * 2]
            self.sets.append((batch.clone(), moved, probes, torch.equal(state, torch.get_rng_state())))


class BeforeInData(pl.LightningDataModule):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def train_dataloader(self) -> Any:
        return DataLoader(torch.arange(4, dtype=self.dtype), batch_size=2)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch.mul_(100)


@pytest.mark.parametrize("in_data", [False, True])
@pytest.mark.filterwarnings("ignore:You have overridden")
def test_a_batch_reaches_the_device_as_in_training(in_data: bool) -> None:
    sets: list[Any] = []
    # The Trainer's conversion does not copy float64.
    data = BeforeInData(torch.float64 if in_data else torch.float32)
    make_trainer().fit(
        Hooked(sets), **({"datamodule": data} if in_data else {"train_dataloaders": data.train_dataloader()})
    )
    ((trained, moved, probes, same_state),) = sets
    factor = 100.0 if in_data else 10.0
    # Precision "64-true" converts them; the hooks wrote into a copy.
    assert [probe.batch.tolist() for probe in probes.batches] == [[0.0, 1.0], [2.0, 3.0]]
    assert {batch.dtype for batch in (trained, *moved)} == {torch.float64}
    assert torch.equal(moved[0][0], trained[0])
    assert [batch[0].tolist() for batch in moved[:2]] == [[1.0, factor + 1], [2 * factor + 1, 3 * factor + 1]]
    assert all(torch.equal(again, first) for again, first in zip(moved[2:], moved[:2], strict=True))
    assert not torch.equal(moved[0][1], moved[1][1])
    assert same_state
