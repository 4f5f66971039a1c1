"""A probe set that cannot be read leaves the run as it is."""

from __future__ import annotations

from typing import Any

import pytest
from torch.utils.data import DataLoader

from lightning_curvature import CurvatureWarning, HessianSpectrumMonitor
from tests.helpers.traps import Hooked, Unreadable
from tests.helpers.witness import Record, assert_same, frozen, watch
from tests.testers.families.spectrum import SPECTRUM


def test_failing_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_curvature.monitors import probe_set as probe_set_monitor

    reading: list[int] = []
    read = probe_set_monitor.read_probe_set

    def noted(*args: Any, **kwargs: Any) -> Any:
        reading.append(1)
        try:
            return read(*args, **kwargs)
        finally:
            reading.pop()

    monkeypatch.setattr(probe_set_monitor, "read_probe_set", noted)
    monkeypatch.setattr(Unreadable, "allowed", staticmethod(lambda: not reading))

    def run(follow: HessianSpectrumMonitor | None) -> tuple[Record, Any]:
        loader = DataLoader(Unreadable(), batch_size=8, shuffle=True)
        record = watch(Hooked, lambda: loader, follow)
        return record, frozen([loader.dataset.generator, loader.dataset.numpy])

    plain, generators = run(None)
    with pytest.warns(CurvatureWarning, match="HessianSpectrumMonitor logs NaN: Boom: unreadable"):
        watched, generators_too = run(SPECTRUM.make())
    assert_same(plain, watched)
    assert generators == generators_too
