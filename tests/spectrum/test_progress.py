"""A measurement that takes its time shows itself on the progress bar, and leaves the bar as it was."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

import pytest
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

from lightning_curvature import BatchSharpnessMonitor, NoiseCovarianceMonitor, StabilizationMonitor
from lightning_curvature.batch_sharpness import monitor as batch_sharpness
from lightning_curvature.noise import monitor as noise
from lightning_curvature.reporting import progress
from lightning_curvature.reporting.progress import Progress
from lightning_curvature.spectrum import monitor as spectrum
from lightning_curvature.stabilization import monitor as stabilization
from tests.helpers.runs import make_trainer
from tests.helpers.spectrum import monitor
from tests.helpers.spectrum_setups import loader, module


class Clock:
    """Goes on by so many seconds each time it is looked at."""

    def __init__(self, pace: float) -> None:
        self.pace, self.now = pace, 0.0

    def __call__(self) -> float:
        self.now += self.pace
        return self.now


class Notes:
    """What stood on the bar: at each product, and when the measurement was over."""

    def __init__(self, pace: float, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pace, self.shown, self.left, self.before = pace, list[str](), list[str](), list[str]()
        notes = self

        class Watched(Progress):
            def __init__(self, trainer: Any, name: str, **options: Any) -> None:
                notes.before.append(notes.said(trainer))
                super().__init__(trainer, name, Clock(pace), **options)
                self.trainer = trainer

            def tick(self) -> None:
                super().tick()
                notes.shown.append(notes.said(self.trainer))

            def close(self) -> None:
                super().close()
                notes.left.append(notes.said(self.trainer))

        for callbacks in (spectrum, batch_sharpness, stabilization, noise):
            monkeypatch.setattr(callbacks, "Progress", Watched)

    def said(self, trainer: Any) -> str:
        bar = trainer.progress_bar_callback
        if isinstance(bar, TQDMProgressBar):
            return bar.train_progress_bar.desc
        if isinstance(bar, RichProgressBar):
            assert bar.progress is not None
            return next(t.description for t in bar.progress.tasks if t.id == bar.train_progress_bar_id)
        return ""


needs_rich = pytest.mark.skipif(importlib.util.find_spec("rich") is None, reason="without rich")
BARS = [TQDMProgressBar, pytest.param(RichProgressBar, marks=needs_rich)]


def fit(bar: Any, **options: Any) -> None:
    follow = monitor("lambda_max", **options)
    make_trainer(bar(), follow, max_epochs=2, enable_progress_bar=True).fit(module(), loader())


@pytest.mark.parametrize("bar", BARS)
def test_long_measurement_shows_itself(bar: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a second a product the note comes with the third, moves with each, and goes when all is done."""
    notes = Notes(1.0, monkeypatch)
    fit(bar)
    assert len(notes.left) == 4
    assert notes.left == notes.before
    assert all(text.startswith("Epoch") for text in notes.before)
    first = notes.shown[: notes.shown.index("Hessian spectrum: 3 products, 3 s")]
    assert first == [notes.before[0]] * 2
    assert notes.shown[3] == "Hessian spectrum: 4 products, 4 s"
    # Each of the four measurements begins to count anew.
    assert notes.shown.count("Hessian spectrum: 3 products, 3 s") == 4


@pytest.mark.parametrize("bar", BARS)
def test_note_moves_once_a_second(bar: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    notes = Notes(0.25, monkeypatch)
    fit(bar, every_n_train_steps=8, max_products=60, tolerance=1e-15)
    moves = [text for text, last in zip(notes.shown[1:], notes.shown, strict=False) if text != last]
    assert len(notes.shown) >= 20
    # After 3 s, then after each further second of four products.
    assert moves[:3] == [f"Hessian spectrum: {n} products, {n / 4:.0f} s" for n in (12, 16, 20)]


@pytest.mark.parametrize("bar", BARS)
def test_short_measurements_are_silent(bar: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    notes = Notes(0.01, monkeypatch)
    fit(bar)
    assert notes.shown
    assert set(notes.shown) <= set(notes.before)
    assert notes.left == notes.before


def test_note_goes_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    notes = Notes(1.0, monkeypatch)

    def late(measurement: Any, problem: Any, basis: int, fail: Any) -> None:
        for _ in range(5):
            problem.on_product()
        raise RuntimeError("late")

    monkeypatch.setattr(spectrum.SpectrumMeasurement, "measure", late)
    with pytest.warns(UserWarning, match="RuntimeError: late"):
        fit(TQDMProgressBar, on_error="warn")
    assert notes.shown[4::5] == ["Hessian spectrum: 5 products, 5 s"] * 4
    assert notes.left == notes.before


@pytest.mark.parametrize("pace", [1.0, 0.001])
def test_the_first_long_measurement_is_told(pace: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a fit, also without a bar."""
    notes, said = Notes(pace, monkeypatch), list[str]()
    monkeypatch.setattr(progress, "inform", said.append)
    sharpness = BatchSharpnessMonitor(every_n_train_steps=2, num_batches=4, min_batches=4)
    make_trainer(monitor("lambda_max"), sharpness, max_epochs=2).fit(module(), loader())
    assert len(notes.left) == 2 * 4
    told = [re.fullmatch(r"(.*): the first measurement took (\d+) products, (\d+) s\.", text) for text in said]
    # It looks at the clock at each product, and when it is over.
    assert [one and one[1] for one in told if one and int(one[3]) == int(one[2]) + 1 > 3] == (
        ["Hessian spectrum", "mini-batch sharpness"] if pace == 1.0 else []
    )
    assert len(said) == (2 if pace == 1.0 else 0)


@pytest.mark.parametrize("pace", [1.0, 0.001])
@pytest.mark.slow
def test_what_is_measured_now_and_then_tells_too(pace: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first measurement in a fit, and not the second."""
    notes, said = Notes(pace, monkeypatch), list[str]()
    monkeypatch.setattr(progress, "inform", said.append)
    growth = StabilizationMonitor(sample_sizes=(4,), candidates=2, subspace_dim=2, at_steps=(0,))
    covariance = NoiseCovarianceMonitor(parameter="network.0.weight", at_steps=(0,), micro_batch_size=2)
    make_trainer(growth, covariance, max_epochs=2).fit(module(), loader())
    assert len(notes.left) == 2 * 2
    told = [re.fullmatch(r"(.*): the first measurement took \d+ (products|batches), \d+ s\.", text) for text in said]
    found = [(one[1], one[2]) for one in told if one]
    assert found == ([("stabilization", "products"), ("noise covariance", "batches")] if pace == 1.0 else [])


def test_without_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    notes = Notes(1.0, monkeypatch)
    make_trainer(monitor("lambda_max")).fit(module(), loader())
    assert set(notes.shown) == {""}
