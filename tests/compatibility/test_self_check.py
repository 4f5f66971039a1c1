"""The first measurement of a fit finds out whether the step can be repeated, and says by name what cannot be."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn

from lightning_curvature import (
    BatchSharpnessMonitor,
    CurvatureWarning,
    DirectionalCurvatureMonitor,
    HessianSpectrumMonitor,
    NoiseCovarianceMonitor,
    StabilizationMonitor,
)
from lightning_curvature.replay.objective import StepObjective
from tests.helpers.counting import out_of_reach
from tests.helpers.runs import Capture, Classifier, classification, make_trainer, mlp
from tests.helpers.stabilization import samples
from tests.helpers.witness import Record, assert_same, copies, frozen, watch

EVERY = {"every_n_train_steps": 2}
MONITORS: dict[str, tuple[Callable[[], pl.Callback], str]] = {
    "directional": (lambda: DirectionalCurvatureMonitor(**EVERY), "lambda_fd"),
    "spectrum": (lambda: HessianSpectrumMonitor(**EVERY), "lambda_max"),
    "batch_sharpness": (lambda: BatchSharpnessMonitor(**EVERY), "batch_sharpness"),
    "stabilization": (
        lambda: StabilizationMonitor(sample_sizes=(2,), probe_dataloader=samples(), at_end=False, **EVERY),
        "delta_2",
    ),
    "noise": (lambda: NoiseCovarianceMonitor(parameter="network.0.weight", at_end=False, **EVERY), "noise_gamma"),
}
# Nothing can put these back.
ticks, weights = itertools.count(), out_of_reach(torch.Generator())


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.1)


class Ticking(Classifier):
    """Its loss is weighted by a count that goes on with each repetition."""

    def __init__(self) -> None:
        super().__init__(mlp(4, 6, 3), sgd)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (1.0 + 0.01 * next(ticks))


class Weighted(Classifier):
    """Weighs its samples by numbers of a generator that belongs to a thread."""

    def __init__(self) -> None:
        super().__init__(mlp(4, 6, 3), sgd)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses = F.cross_entropy(self(batch[0]), batch[1], reduction="none")
        return (losses * torch.rand(len(losses), generator=weights())).mean()


def run(make: Callable[[], Any], follow: pl.Callback | None) -> tuple[Record, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        record = watch(make, lambda: copies(classification(6)), follow)
    return record, [str(w.message) for w in caught if issubclass(w.category, CurvatureWarning)]


@pytest.mark.parametrize("make", [Ticking, Weighted])
@pytest.mark.parametrize("family", MONITORS)
def test_a_step_that_cannot_be_repeated(family: str, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said once, after two evaluations, and at the end; all values are NaN, and no more is evaluated."""
    evaluations = out_of_reach([])
    evaluate = StepObjective._evaluate
    monkeypatch.setattr(StepObjective, "_evaluate", lambda *args: evaluations().append(1) or evaluate(*args))
    monitor, key = MONITORS[family]
    record, said = run(make, monitor())
    values = record.curve(key)
    assert len(values) == 3
    assert all(map(math.isnan, values))
    sentence, end = [text for text in said if "must give the same loss" in text]
    assert "must make the measurements that are due, got 0 of 3: " in end
    assert "keep counters and random generators on the module" in sentence
    # The directional monitor compares with the loss of the step itself.
    assert len(evaluations()) == (1 if family == "directional" else 2)


class Climbing(torch.optim.Optimizer):
    """SAM as it is often written: it climbs along the last gradient before it calls its closure."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        parameters = self.param_groups[0]["params"]
        before = [p.clone() for p in parameters]
        for p in parameters:
            if p.grad is not None:
                p.data.add_(p.grad, alpha=0.5)
        loss = torch.enable_grad()(closure)()
        for p, kept in zip(parameters, before, strict=True):
            p.copy_(kept).add_(p.grad, alpha=-0.1)
        return loss


@pytest.mark.filterwarnings("ignore::lightning_curvature.CurvatureWarning")
def test_an_optimizer_that_moves_before_its_closure() -> None:
    """θ_t is not where its loss is: the step is refused, from the first that has a gradient to climb along."""

    def make() -> Any:
        return Classifier(mlp(4, 6, 3), lambda m: Climbing(m.parameters()))

    plain, _ = run(make, None)
    watched, said = run(make, DirectionalCurvatureMonitor(every_n_train_steps=3))
    assert_same(plain, watched)
    assert [math.isnan(value) for value in watched.curve("lambda_fd")] == [False, True]
    assert sum("parameters must be those of the start of a batch" in text for text in said) == 1


class Leaving(Classifier):
    """Is left with an attribute more."""

    def __init__(self) -> None:
        super().__init__(mlp(4, 6, 3), sgd)


@pytest.mark.parametrize("family", MONITORS)
def test_what_does_not_come_back_is_named(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A restorer that is broken stands for what nobody has thought of."""
    from lightning_curvature.replay import snapshot

    class Forgetful(snapshot.Snapshot):
        def restore(self) -> None:
            super().restore()
            if self._whole and (module := next(iter(self.seen.values()))).__class__ is Leaving:
                module.left = 1

    monkeypatch.setattr("lightning_curvature.replay.isolation.Snapshot", Forgetful)
    _, said = run(Leaving, MONITORS[family][0]())
    sentence, *_ = [text for text in said if "what cannot be put back" in text]
    assert "Leaving" in sentence or "left" in sentence


class Sealing(Classifier):
    """Seals an array, so that nobody can put it back, and is interrupted the first time that it runs."""

    def __init__(self) -> None:
        super().__init__(mlp(4, 6, 3), sgd)
        self.array, self.calls = np.zeros(3), out_of_reach([])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.array += 1.0
        self.array.setflags(write=False)
        self.calls().append(batch_idx)
        raise KeyboardInterrupt


@pytest.mark.parametrize("family", ["spectrum", "batch_sharpness", "stabilization", "noise"])
def test_an_interrupt_stops_although_something_does_not_come_back(family: str) -> None:
    module = Sealing()
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        make_trainer(MONITORS[family][0]()).fit(module, copies(classification(2)))
    assert module.calls() == [0]


class Lazy(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.LazyLinear(6), nn.Tanh(), nn.LazyLinear(3)).double()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("family", MONITORS)
def test_lazy_modules_are_materialised_by_the_first_real_step(family: str) -> None:
    monitor, key = MONITORS[family]

    def fit(*callbacks: pl.Callback) -> tuple[Any, list[float]]:
        torch.manual_seed(3)
        module, capture = Lazy(), Capture()
        make_trainer(*callbacks, logger=capture).fit(module, copies(classification(6)))
        return frozen(module.state_dict()), capture.curve(f"curvature/{key}")

    plain, _ = fit()
    watched, values = fit(monitor())
    assert watched == plain
    # Before the first step there is nothing to measure: it is made up for at the next.
    assert len(values) == 3
    assert all(map(math.isfinite, values))


class Asking(Classifier):
    """Asks the Trainer and the optimizers what they are."""

    def __init__(self) -> None:
        super().__init__(mlp(4, 6, 3), sgd)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert isinstance(self.trainer, pl.Trainer)
        assert isinstance(self.optimizers(), LightningOptimizer)
        assert isinstance(self.optimizers(use_pl_optimizer=False), torch.optim.SGD)
        assert isinstance(self.trainer.optimizers[0], torch.optim.Optimizer)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("family", MONITORS)
@pytest.mark.thinned(3)
def test_trainer_and_optimizers_answer_as_in_training(family: str) -> None:
    monitor, key = MONITORS[family]
    watched, said = run(Asking, monitor())
    assert all(map(math.isfinite, watched.curve(key)))
    assert not any("AssertionError" in text for text in said)


@pytest.mark.filterwarnings("ignore::lightning_curvature.CurvatureWarning")
def test_a_failed_step_leaves_the_edge_of_another_monitor_alone() -> None:
    rows = watch(
        Ticking,
        lambda: copies(classification(2)),
        DirectionalCurvatureMonitor(every_n_train_steps=1, objective=lambda module, batch: 1 / 0),
        lambda: [HessianSpectrumMonitor(every_n_train_steps=1, quantities=("lambda_max",))],
    )
    assert rows.curve("two_over_lr") in ([], [20.0, 20.0])
