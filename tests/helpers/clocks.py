"""Time that passes with the forwards of a network, and with nothing else: a measurement then has an exact price."""

from __future__ import annotations

import pytest
from torch import nn

from lightning_curvature.monitors import price
from tests.helpers.counting import on_forward


class ForwardClock:
    """A clock of the package on which each forward of a network takes so many seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, network: nn.Module, seconds: float = 1.0) -> None:
        self.now, self.seconds = 0.0, seconds
        monkeypatch.setattr(price, "clock", lambda: self.now)
        on_forward(network, self._passed)

    def _passed(self, *args: object) -> None:
        self.now += self.seconds
