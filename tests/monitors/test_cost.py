"""What a measurement costs before there is a fit, on a clock that goes with the forwards of the network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_curvature import (
    BatchSharpnessMonitor,
    DirectionalCurvatureMonitor,
    HessianSpectrumMonitor,
    RegimeMonitor,
    StabilityMonitor,
)
from lightning_curvature.monitors.cost import Cost
from tests.helpers.clocks import ForwardClock
from tests.helpers.runs import Classifier, batched_samples, mlp
from tests.helpers.traps import Boom
from tests.helpers.witness import frozen, module_state, random_states


class Learner(Classifier):
    """Fails at a forward on demand."""

    def __init__(self) -> None:
        super().__init__(mlp(4, 6, 3), lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9))
        self.fails = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.fails:
            raise Boom
        return super().training_step(batch, batch_idx)


SPECTRUM: dict[str, Any] = {"quantities": ("lambda_max",), "micro_batch_size": 8}


@pytest.mark.parametrize(
    ("make", "forwards"),
    [
        # A pair, and the look whether the step can be repeated.
        (lambda: DirectionalCurvatureMonitor(estimators=("finite_difference",)), 3.0),
        # That look, and one graph for both micro-batches of 16 samples.
        (lambda: HessianSpectrumMonitor(**SPECTRUM, keep_graph=True), None),
    ],
)
def test_in_forward_and_backwards_of_a_batch(make: Any, forwards: float, monkeypatch: pytest.MonkeyPatch) -> None:
    module = Learner()
    ForwardClock(monkeypatch, module.network, seconds=0.25)
    found = make().cost(module, batched_samples())
    assert found.forward_backward == 0.25
    if forwards is not None:
        assert found.seconds == 0.25 * forwards
        assert found.forward_backwards == forwards
    else:
        assert found.forward_backwards.is_integer()
        assert 2.0 <= found.forward_backwards <= 3.0


def test_it_is_what_a_fit_tells() -> None:
    found = Cost(seconds=0.6, forward_backward=0.02)
    assert found.forward_backwards == pytest.approx(30.0)
    assert (found.interval(0.1), found.interval(0.5), found.interval(100.0)) == (300, 60, 1)
    assert str(found) == (
        "a measurement takes 0.6 s, the time of 30 forward+backwards of a batch: one every 300 steps adds 10 %"
    )


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("make", [DirectionalCurvatureMonitor, BatchSharpnessMonitor])
def test_nothing_is_changed(make: Any, fails: bool) -> None:
    module, loader = Learner(), batched_samples()
    optimizer = module.configure_optimizers()
    module.training_step(next(iter(loader)), 0).backward()
    optimizer.step()
    before = frozen([module_state(module), optimizer.state_dict(), random_states()])
    module.fails = fails
    monitor = make(on_error="raise")
    if fails:
        with pytest.raises(Boom):
            monitor.cost(module, loader, optimizer)
    else:
        assert monitor.cost(module, loader, optimizer).seconds > 0.0
    module.fails = False
    assert frozen([module_state(module), optimizer.state_dict(), random_states()]) == before
    assert monitor.result is None


@pytest.mark.parametrize(
    "make", [RegimeMonitor, StabilityMonitor, lambda: DirectionalCurvatureMonitor(estimators=("oscillation",))]
)
def test_what_has_no_value_at_a_point_has_no_cost(make: Any) -> None:
    with pytest.raises(MisconfigurationException):
        make().cost(Learner(), batched_samples())


def test_a_module_that_is_none() -> None:
    with pytest.raises(MisconfigurationException, match="module must be a LightningModule"):
        BatchSharpnessMonitor().cost(torch.nn.Linear(2, 2), batched_samples())
