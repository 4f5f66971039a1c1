"""Counts of forwards, backwards and samples that are read."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tests.helpers.spectrum import samples


class Passes(pl.Callback):
    """Counts forwards and backwards of the network of each batch: the measurement before its step, and the step."""

    def __init__(self, network: nn.Module) -> None:
        self.forwards: list[int] = []
        self.backwards: list[int] = []
        network.register_forward_hook(self._seen)

    def on_train_batch_start(self, *args: Any) -> None:
        for row in (self.forwards, self.backwards):
            row.append(0)

    def _seen(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.forwards[-1] += 1
        if output.requires_grad:
            output.register_hook(self._passed_back)

    def _passed_back(self, gradient: Tensor) -> None:
        self.backwards[-1] += 1


class Reads(TensorDataset):
    """Counts the samples that are read, outside of itself: its own attributes are put back."""

    count = 0

    def __init__(self) -> None:
        super().__init__(*samples())
        Reads.count = 0

    def __getitem__(self, index: Any) -> Any:
        Reads.count += 1
        return super().__getitem__(index)
