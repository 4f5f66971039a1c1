"""Counts of forwards, backwards and samples that are read."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.data import TensorDataset

from tests.helpers.spectrum import samples


def out_of_reach(value: Any) -> Callable[[], Any]:
    """Return a function that gives a value which no measurement puts back, since it belongs to a thread."""
    bag = threading.local()
    bag.value = value
    return lambda: bag.value


def on_forward(network: nn.Module, hook: Callable[..., object], before: bool = False) -> None:
    """Call a hook after each forward of a network, from outside of its reach: what its own hooks count is put back.

    Or before it, without the output.
    """
    reference = weakref.ref(network)

    def called(module: nn.Module, *args: Any) -> None:
        if module is reference():
            hook(module, *args)
        elif reference() is None:
            handle.remove()

    handle = (register_module_forward_pre_hook if before else register_module_forward_hook)(called)


class Passes(pl.Callback):
    """Counts forwards and backwards of the network of each batch: the measurement before its step, and the step."""

    def __init__(self, network: nn.Module) -> None:
        self.forwards: list[int] = []
        self.backwards: list[int] = []
        on_forward(network, self._seen)

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
