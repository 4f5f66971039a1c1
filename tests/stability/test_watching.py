"""What others see of the stability index: stoppers, resumed runs, counts, reasons, steps that are no step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor, nn

from lightning_curvature import StabilityMonitor
from lightning_curvature.stability.average import MovingAverage
from tests.helpers.counting import Passes
from tests.helpers.runs import Classifier, classification, loader, make_trainer, mlp, rows, run, warned


def monitor(**options: Any) -> StabilityMonitor:
    return StabilityMonitor(**({"every_n_train_steps": 1, "decay": 0.6} | options))


def learner(lr: float = 0.3, network: nn.Module | None = None) -> Classifier:
    return Classifier(network or mlp(4, 6, 3), lambda m: torch.optim.SGD(m.parameters(), lr=lr, momentum=0.9))


def test_a_stopper_sees_it_once_it_is_known() -> None:
    stop = EarlyStopping("curvature/stability_index", mode="min", divergence_threshold=1e-9, check_finite=False)
    stop_each = EarlyStopping("curvature_diagnostics/stability_index_steps", patience=99)
    outcome = run(learner(), classification(12), monitor(), stop, stop_each, max_epochs=3)
    # NaN until eight steps are measured, which happens in the first epoch.
    assert outcome.trainer.global_step == 12
    found = [row["stability_index"] for row in rows(outcome.capture).values()]
    assert [math.isnan(value) for value in found] == [True] * 9 + [False] * 3


def test_the_window_holds_the_last_steps() -> None:
    follow = monitor(window=8)
    run(learner(), classification(20), follow)
    assert follow.result is not None
    assert len(follow.result.steps) == 8
    longer = monitor(window=18)
    run(learner(), classification(20), longer)
    assert longer.result is not None
    assert longer.result.steps[-8:] == follow.result.steps


def test_a_resumed_run_keeps_the_measured_steps(tmp_path: Path) -> None:
    """The average is formed anew: two steps of a resumed run are not measured."""
    follow, data = monitor(), classification(12)
    trainer = make_trainer(follow, max_steps=12)
    trainer.fit(learner(), loader(data))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    assert follow.result is not None
    again = monitor()
    make_trainer(again, max_epochs=2).fit(learner(), loader(data), ckpt_path=tmp_path / "one.ckpt")
    assert again.result is not None
    assert len(again.result.steps) == 10 + 10
    assert again.result.steps[:10] == follow.result.steps


@pytest.mark.parametrize(("accumulate", "forwards"), [(1, 2), (2, 2), (4, 4)])
def test_products_of_a_measured_step(accumulate: int, forwards: int) -> None:
    """One batch: by halves, after three forwards once a fit, and one that shows that the step can be repeated."""
    module = learner()
    passes = Passes(module.network)
    follow = monitor(every_n_train_steps=4)
    run(module, classification(12 * accumulate), passes, follow, accumulate_grad_batches=accumulate)
    per_step = [sum(passes.forwards[k : k + accumulate]) for k in range(0, len(passes.forwards), accumulate)]
    first = 1 + 3 * (accumulate == 1)
    # The callback stands before the monitor, which measures at the last batch of the window before the step's forward.
    assert per_step == [accumulate + (forwards + first * (k == 4) if k in (4, 8) else 0) for k in range(12)]


class Unknown(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def test_optimizers_that_are_not_known_have_no_index() -> None:
    module = Classifier(mlp(4, 6, 3), lambda m: Unknown(m.parameters(), lr=0.1))
    follow = monitor(every_n_train_steps=5)
    said = warned(lambda: run(module, classification(12), follow))
    assert any("optimizer must be one of torch.optim's SGD" in text and "got Unknown" in text for text in said)


class Pairwise(Classifier):
    """A loss that is neither the mean nor the sum over the samples of a batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        z = self(batch[0])
        return (z @ z.T).square().sum() + 1e-3 * super().training_step(batch, batch_idx)


def test_losses_that_cannot_be_halved_are_told() -> None:
    module = Pairwise(mlp(4, 6, 3), lambda m: torch.optim.SGD(m.parameters(), lr=1e-4))
    with pytest.raises(ValueError, match="training_step must have a loss that is the mean or the sum over a"):
        run(module, classification(6), monitor(on_error="raise"))


class Dropping(Classifier):
    def __init__(self) -> None:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Dropout(0.2), nn.Linear(32, 3)).double()
        super().__init__(network, lambda m: torch.optim.SGD(m.parameters(), lr=0.1))


def test_halves_have_masks_of_their_own() -> None:
    """With the same masks the noise of dropout would not be seen: two halves of equal samples would not differ."""
    batch = tuple(torch.cat([t, t]) for t in classification(1, 4)[0])
    follow = monitor(on_error="raise")
    run(Dropping(), [batch] * 12, follow)  # type: ignore[list-item]
    assert follow.result is not None
    assert all(one.variance > 0.0 for one in follow.result.steps)


def test_one_batch_an_epoch_has_no_noise() -> None:
    follow = monitor(on_error="raise")
    run(learner(), classification(1), follow, max_epochs=12)
    assert follow.result is not None
    assert all(one.variance == one.noise == 0.0 for one in follow.result.steps)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_average_has_weights_that_add_up_to_one(dtype: torch.dtype) -> None:
    average, path = MovingAverage(0.9), torch.randn(30, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight = nn.Parameter(path[0].clone())
    for step, value in enumerate(path, 1):
        weight.data.copy_(value)
        average.add([weight])
        assert average.is_ready([weight]) == (step >= 10)
        weights = 0.9 ** torch.arange(step - 1, -1, -1, dtype=torch.float64)
        mean = weights @ path[:step].double() / weights.sum()
        (displacement,) = average.displacement([weight])
        # Thirty roundings of the average's own type.
        unit = torch.finfo(displacement.dtype).eps
        assert torch.allclose(displacement.double(), value.double() - mean, rtol=0.0, atol=60 * unit)


def test_other_parameters_begin_anew() -> None:
    average, one, other = MovingAverage(0.5), nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4))
    assert [average.add([p]) for p in (one, one, other, one)] == [False, False, True, True]
    assert not average.is_ready([other])
