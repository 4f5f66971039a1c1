"""Where a measurement of the noise covariance fails, the run goes on as it would have, and nothing is left open."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo import eval_frame
from torch.utils.checkpoint import CheckpointFunction

from lightning_curvature import CurvatureWarning
from lightning_curvature.noise import sums as noise_sums
from lightning_curvature.noise.options import QUANTITIES
from tests.helpers import traps
from tests.helpers.nested import Nested, everything
from tests.helpers.noise_runs import KEYS, monitor, samples
from tests.helpers.runs import make_trainer
from tests.helpers.traps import Boom
from tests.helpers.witness import assert_same, difference, watch


class Trapped(traps.Trapped):
    """Fails from some repetition of the first measurement on, with everything in disorder."""

    def __init__(self, call: int) -> None:
        super().__init__([call])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        try:
            return super().training_step(batch, batch_idx)
        except Boom:
            self.trap()[0] = 1  # the next one, too: a failure under ``torch.vmap`` is tried again without
            raise

    def on_train_batch_end(self, *args: Any) -> None:
        self.trap()[0] = 0


@pytest.mark.parametrize("name", ["network.0.weight", "network.3.bias"])
@pytest.mark.parametrize("call", [1, 2, 5, 14, 25])
@pytest.mark.filterwarnings("ignore:noise_")
def test_failing_step(call: int, name: str) -> None:
    """In what is checked of the first batch, in a whole batch, in a single sample of the first or the second one."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        watched = watch(lambda: Trapped(call), samples, monitor(name, every_n_train_steps=1))
    assert_same(watch(lambda: Trapped(0), samples, None), watched)
    said = [str(w.message) for w in caught if issubclass(w.category, CurvatureWarning)]
    assert said[0] == "NoiseCovarianceMonitor logs NaN: Boom: trapped"
    for key in KEYS[1:]:
        first, *rest = watched.curve(key)
        assert math.isnan(first), key
        # Before the second step, and at the end.
        assert len(rest) == 2
        assert all(math.isfinite(value) for value in rest), key


def modes() -> Any:
    """What a context that was left open would show in."""
    cuda = torch.backends.cuda
    kernels = [cuda.math_sdp_enabled(), cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled()]
    return [torch.is_grad_enabled(), kernels, "apply" in vars(CheckpointFunction), eval_frame._stance.stance]


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
        follow.evaluate(module, samples(), make_trainer())
    assert modes() == state
    assert held.value is not None
    assert difference(before, everything(module)) is None
    assert not {"training_step", "forward", "log"} & set(vars(module))
