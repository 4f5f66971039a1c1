"""Alarms by the values of the package's own monitors, whose oracle is the oscillation in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lightning_curvature import DirectionalCurvatureMonitor, HessianSpectrumMonitor, StabilityMonitor
from lightning_curvature.functional import REGIMES
from tests.helpers.digits import digits
from tests.helpers.regimes import Oscillation, Raise, fit, monitor
from tests.helpers.runs import Capture, Classifier, classification, loader, make_trainer, mlp, rows

AT = 20


def measured() -> DirectionalCurvatureMonitor:
    return DirectionalCurvatureMonitor(estimators=("oscillation",), every_n_train_steps=1, on_error="raise")


def test_a_quadratic() -> None:
    """The same regimes and alarms as by the oracle; the ratio to the error that comes with λ_osc."""
    found = []
    for one in (Oscillation(), measured()):
        _, values = fit(one, monitor(), Raise(AT, 1.2 / 0.98), ratio=0.98)
        found.append(values)
    for step, row in found[0].items():
        other = found[1][step]
        assert (row["regime"], row["regime_alarm"]) == (other["regime"], other["regime_alarm"]), step
        assert other["edge_ratio"] == pytest.approx(row["edge_ratio"], rel=1e-3, nan_ok=True)
    assert any(row["regime_alarm"] for row in found[0].values())


def test_a_network_on_digits() -> None:
    """Full batch, squared error: sharpening up to the edge, a learning rate that is doubled there, and an alarm."""
    capture, follow, at = Capture(), monitor(), 160
    features = [(x.double(), torch.nn.functional.one_hot(y, 10).double()) for x, y in digits(None, 1)] * (at + 30)

    def half_square(outputs: Any, targets: Any) -> Any:
        return 0.5 * (outputs - targets).square().sum(-1).mean()

    module = Classifier(mlp(64, 16, 10, seed=1), lambda m: torch.optim.SGD(m.parameters(), lr=0.2), half_square)
    spectrum = HessianSpectrumMonitor(every_n_train_steps=10, probe_dataloader=loader(features[:1]), on_error="raise")
    trainer = make_trainer(follow, spectrum, measured(), Raise(at, 2.0), logger=capture)
    trainer.fit(module, loader(features))
    found = rows(capture)
    names = [int(found[step]["regime"]) for step in sorted(found)]
    # In a cycle of self-stabilization the ratio may fall below 0.9 for a moment.
    assert names[at - 20 : at].count(REGIMES.index("edge of stability")) >= 15
    assert not any(found[step]["regime_alarm"] for step in range(30, at))
    losses = [capture.rows[step]["train_loss"] for step in sorted(found)]
    before = min(losses[at - 20 : at])
    doubled = next(step for step in range(at, len(losses)) if losses[step] > 2.0 * before)
    alarm = next(step for step in range(at, len(losses)) if found[step]["regime_alarm"])
    # The alarm of a step comes before the loss of the next one is there.
    assert alarm < doubled
    assert REGIMES[names[doubled]] in ("catapult", "diverging")


def test_an_index_of_mini_batches() -> None:
    """Written by any monitor under its key."""

    class Index(Oscillation):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            index = 0.7 if batch_idx < AT else 1.3
            self._write(trainer, {"stability_index": index, "stability_index_stderr": 0.1})

    follow = monitor(batches="mini", on_alarm=("stop",))
    _, found = fit(Index(), follow)
    ratios = [row["edge_ratio"] for row in found.values()]
    assert ratios == [0.7] * AT + [1.3] * (len(ratios) - AT)
    assert len(ratios) > AT + 2
    assert follow.result.edge.source == "stability_index"
    # Networks go on for hundreds of steps with an index above 1.
    assert not any(row["regime_alarm"] for row in found.values())


def test_the_index_of_the_package() -> None:
    """SGD far below the edge; the index needs eight measured steps."""
    capture, follow = Capture(), monitor(batches="auto")
    stability = StabilityMonitor(every_n_train_steps=1, decay=0.5, on_error="raise")
    module = Classifier(mlp(4, 6, 3), lambda m: torch.optim.SGD(m.parameters(), lr=0.01))
    make_trainer(follow, stability, logger=capture, max_epochs=10).fit(module, loader(classification(4)))
    found = rows(capture)
    compared = [(row["edge_ratio"], row["stability_index"]) for row in found.values() if "stability_index" in row]
    assert sum(not math.isnan(index) for _, index in compared) > 20
    assert all(ratio == index or math.isnan(index) for ratio, index in compared)
    assert follow.result.edge.source == "stability_index"
    assert not any(row["regime_alarm"] for row in found.values())
