"""The state of random generators, saved and put back."""

import random
import sys
from typing import Any

import torch


class RandomState:
    """State of all random generators of a step: Python's, numpy's if imported, torch's on the CPU and on the device."""

    def __init__(self, device: torch.device) -> None:
        self._python = random.getstate()
        self._numpy = sys.modules["numpy"].random.get_state() if "numpy" in sys.modules else None
        self._torch = torch.get_rng_state()
        self._accelerator: Any = None if device.type == "cpu" else getattr(torch, device.type)
        # torch.mps has one device and takes no argument.
        self._index = () if device.type == "mps" else (device,)
        self._on_device = self._accelerator and self._accelerator.get_rng_state(*self._index)

    def restore(self) -> None:
        """Set all of them back."""
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)
        torch.set_rng_state(self._torch)
        if self._accelerator is not None:
            self._accelerator.set_rng_state(self._on_device, *self._index)
