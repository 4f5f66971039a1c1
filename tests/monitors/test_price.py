"""What measurements cost is told once, in steps of the run, and ``max_overhead`` stretches the interval by it."""

from __future__ import annotations

import logging
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_curvature import (
    BatchSharpnessMonitor,
    DirectionalCurvatureMonitor,
    HessianSpectrumMonitor,
    StabilizationMonitor,
)
from lightning_curvature.monitors.base import Monitor
from lightning_curvature.monitors.price import stretched
from tests.helpers.clocks import ForwardClock
from tests.helpers.runs import Capture, Classifier, batched_samples, classification, loader, make_trainer, mlp, rows

STEPS = 40
LOG = "lightning.pytorch.utilities.rank_zero"


GROWTH: dict[str, Any] = {
    "sample_sizes": (2, 5),
    "candidates": 2,
    "subspace_dim": 1,
    "trace_vectors": 3,
    "tolerance": 0.1,
    "quantities": ("delta_1",),
}


def learner() -> Classifier:
    return Classifier(mlp(4, 6, 3), lambda m: torch.optim.SGD(m.parameters(), lr=0.1))


def pair(**options: Any) -> DirectionalCurvatureMonitor:
    """Two forwards a measurement, and one more in the first, which looks whether the step can be repeated."""
    return DirectionalCurvatureMonitor(estimators=("finite_difference",), on_error="raise", **options)


def exact(**options: Any) -> HessianSpectrumMonitor:
    """One micro-batch, whose graph is kept."""
    return HessianSpectrumMonitor(quantities=("lambda_max",), probe_samples=4, on_error="raise", **options)


def fit(
    monkeypatch: pytest.MonkeyPatch,
    *monitors: Monitor,
    steps: int = STEPS,
    seconds: float = 1.0,
    single: bool = False,
    **options: Any,
) -> tuple[Capture, Any]:
    module, capture = learner(), Capture()
    clock = ForwardClock(monkeypatch, module.network, seconds)
    trainer = make_trainer(*monitors, logger=capture, max_steps=steps, max_epochs=-1, **options)
    trainer.fit(module, batched_samples() if single else loader(classification(steps)))
    return capture, clock


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "Monitor: " in record.getMessage()]


@pytest.fixture(autouse=True)
def _listen(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, LOG)


def test_the_first_measurement_is_told_in_plain_steps(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fit(monkeypatch, pair(every_n_train_steps=20), seconds=0.5)
    # Three forwards of 0.5 s, and a plain step has one.
    assert told(caplog) == [
        "DirectionalCurvatureMonitor: the measurement took 1.5 s, the time of 3 steps; at that price one every 20 "
        "steps makes the run 15 % longer."
    ]


def test_later_measurements_count_where_there_are_some(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fit(monkeypatch, pair(every_n_train_steps=5))
    assert told(caplog) == [
        "DirectionalCurvatureMonitor: a measurement takes 2 s, the time of 2 steps; at that price one every 5 steps "
        "makes the run 40 % longer."
    ]


def test_other_monitors_are_no_part_of_a_plain_step(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # The costlier one stands before it, then behind it.
    for monitors in ([exact(every_n_train_steps=1), pair(every_n_train_steps=20)], [pair(), exact()]):
        fit(monkeypatch, *monitors)
    assert [m for m in told(caplog) if m.startswith("Directional")] == [
        "DirectionalCurvatureMonitor: the measurement took 3 s, the time of 3 steps; at that price one every 20 steps "
        "makes the run 15 % longer.",
        "DirectionalCurvatureMonitor: a measurement takes 2 s, the time of 2 steps; at that price one every 10 steps "
        "makes the run 20 % longer.",
    ]


def test_accumulated_batches_make_one_step(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A measured step repeats both of them twice; the look whether it can be repeated takes one."""
    fit(monkeypatch, pair(every_n_train_steps=12), accumulate_grad_batches=2)
    assert told(caplog) == [
        "DirectionalCurvatureMonitor: the measurement took 5 s, the time of 2.5 steps; at that price one every 12 "
        "steps makes the run 21 % longer."
    ]


def test_a_short_fit_tells_at_its_end_and_one_measurement_has_no_interval(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fit(monkeypatch, StabilizationMonitor(**GROWTH), steps=4, single=True)
    (sentence,) = told(caplog)
    assert sentence.startswith("StabilizationMonitor: the measurement took ")
    assert sentence.endswith(" steps.")


def test_nothing_is_told_of_a_fit_without_measurements(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fit(monkeypatch, pair(every_n_train_steps=20), steps=1)
    assert told(caplog) == []


@pytest.mark.parametrize(
    ("options", "interval"),
    # Two forwards along the step: 0.2 of five steps; the first has three.
    [({"max_overhead": 0.2}, 10), ({"max_overhead": 0.05}, 40), ({"max_overhead": 0.4}, 5), ({}, 5)],
)
def test_the_interval_is_stretched(options: dict[str, float], interval: int, monkeypatch: pytest.MonkeyPatch) -> None:
    capture, _ = fit(monkeypatch, pair(every_n_train_steps=5, **options), steps=200)
    measured = list(rows(capture))
    # Ten plain steps must be known; thereafter the grid of the longer interval is one of the shorter.
    late = [step for step in measured if step > 3 * interval]
    assert late == list(range(4 * interval, 200, interval))
    assert set(measured) <= set(range(0, 200, 5))


def test_stretching_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The first measurement has three forwards, later ones two."""
    fit(monkeypatch, pair(every_n_train_steps=20, max_overhead=0.145), steps=200)
    begin = "DirectionalCurvatureMonitor: every_n_train_steps is"
    assert told(caplog)[1:] == [
        f"{begin} 40 now, by max_overhead=0.145: a measurement takes 3 s, the time of 3 steps.",
        f"{begin} 20 now, by max_overhead=0.145: a measurement takes 2 s, the time of 2 steps.",
    ]


@pytest.mark.parametrize("kind", [pair, exact, BatchSharpnessMonitor])
def test_the_whole_run_stays_within_the_bound(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in forwards of the network; beyond the measurements before anything was known."""
    steps, every, bound = 400, 1, 0.5
    capture, clock = fit(monkeypatch, kind(every_n_train_steps=every, max_overhead=bound), steps=steps)
    early = [step for step in rows(capture) if step < 32]
    extra = clock.now - steps
    per = extra / len(rows(capture))
    # The first measurement costs more, and an interval may be one measurement short at its change.
    assert extra - per * (len(early) + 2) <= bound * steps
    assert len(rows(capture)) > len(early)


def test_a_run_is_the_same_with_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which steps are measured depends on the clock, and nothing of the run does."""

    def weights(*monitors: Monitor) -> list[torch.Tensor]:
        torch.manual_seed(0)
        module = learner()
        make_trainer(*monitors).fit(module, loader(classification(STEPS)))
        return [p.detach().clone() for p in module.parameters()]

    plain, watched = weights(), weights(pair(every_n_train_steps=1, max_overhead=0.01))
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))


def test_a_checkpoint_keeps_the_interval(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def make() -> DirectionalCurvatureMonitor:
        return pair(every_n_train_steps=5, max_overhead=0.06)

    keep = ModelCheckpoint(tmp_path, filename="last", every_n_train_steps=50)
    fit(monkeypatch, make(), keep, steps=50, enable_checkpointing=True)  # type: ignore[arg-type]
    module, capture = learner(), Capture()
    ForwardClock(monkeypatch, module.network)
    trainer = make_trainer(make(), logger=capture, max_epochs=4)
    trainer.fit(module, loader(classification(50)), ckpt_path=str(tmp_path / "last.ckpt"))
    # Once in forty steps; what is measured first after it costs three forwards again.
    assert list(rows(capture)) == [80, 160]


def test_a_state_of_other_options_is_taken_up(tmp_path: Path) -> None:
    """With a bound and without, in either order."""
    for first, second in ((0.1, None), (None, 0.1)):
        state = pair(max_overhead=first).state_dict()
        other = pair(max_overhead=second)
        other.load_state_dict(state)
        assert other._interval == 10


def test_an_interval_is_the_shortest_within_its_bound() -> None:
    draw = random.Random(0)
    for _ in range(2000):
        least, bound = draw.randint(1, 50), draw.uniform(0.01, 2.0)
        steps = 10 ** draw.uniform(-2, 4)
        interval = least * 2 ** draw.randint(0, 10)
        found = stretched(interval, steps, bound, least)
        assert found % least == 0
        assert math.log2(found // least).is_integer()
        assert steps <= bound * found
        # The half of it would cost too much, or so nearly that noise could bring it back.
        assert found == least or steps > 0.7 * bound * (found // 2)
    assert stretched(20, math.nan, 0.1, 10) == 20


@pytest.mark.parametrize("value", [0.0, -0.1, math.nan, math.inf, "0.1"])
def test_a_bound_that_is_none(value: Any) -> None:
    with pytest.raises(
        ValueError, match=r"max_overhead must lie in \(0, 100\], or None, got .*: 0.1 lets measurements take a tenth"
    ):
        pair(max_overhead=value)


def test_a_bound_without_an_interval() -> None:
    sentence = r"max_overhead must come with an interval to stretch, got 0.1 and every_n_train_steps=None: set every_n"
    with pytest.raises(ValueError, match=sentence):
        StabilizationMonitor(max_overhead=0.1)


def test_a_bound_on_the_way_leaves_named_steps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    named: dict[str, Any] = {"at_steps": (3, 17), "at_end": False}
    follow = StabilizationMonitor(**GROWTH, **named, every_n_train_steps=15, max_overhead=1e-3)
    capture, _ = fit(monkeypatch, follow, steps=60, single=True)
    assert list(rows(capture)) == [0, 3, 17]
