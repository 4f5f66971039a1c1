"""Where a measurement of the noise covariance fails, the run goes on as it would have, and nothing is left open."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_curvature.noise import sums as noise_sums
from lightning_curvature.noise.options import QUANTITIES
from tests.helpers.faults import modes
from tests.helpers.nested import Nested, everything
from tests.helpers.noise_runs import monitor, samples
from tests.helpers.runs import make_trainer
from tests.helpers.traps import Boom
from tests.helpers.witness import difference


@pytest.mark.parametrize("place", ["sums", "hessian", "squares"])
def test_raising_leaves_nothing_open(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also as long as the error, and with it all frames, is held by somebody."""

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise Boom("trapped")

    target = {"sums": "linear_statistics", "hessian": "products_with", "squares": "_squares"}[place]
    monkeypatch.setattr(noise_sums, target, fail)
    module = Nested()
    before, state = everything(module), modes()
    name = "inner.network.0.0.weight" if place == "sums" else "inner.network.0.0.bias"
    follow = monitor(name, quantities=QUANTITIES[:-1], on_error="raise")
    with pytest.raises(Boom) as held:
        follow.evaluate(module, samples(), trainer=make_trainer())
    assert modes() == state
    assert held.value is not None
    assert difference(before, everything(module)) is None
    assert not {"training_step", "forward", "log"} & set(vars(module))
