"""Running means over measurements: their values, their standard errors, and what they spare."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_curvature.batch_sharpness.average import RunningMeans
from tests.helpers.batch_sharpness import fit, learner, loader, monitor
from tests.helpers.runs import Capture, make_trainer, rows

QUANTITIES = ("batch_sharpness", "gni", "step_sharpness")
# A sum of a few doubles, and its quotient.
ROUNDING = 1e-14


@pytest.mark.parametrize("over", [2, 3, 50])
def test_means_and_errors_are_those_of_the_last_measurements(over: int) -> None:
    follow = monitor(*QUANTITIES, average_over=over, every_n_train_steps=1)
    found = list(fit(follow, max_epochs=3).rows.values())
    assert len(found) > 4
    for index, row in enumerate(found):
        last = found[max(0, index + 1 - over) : index + 1]
        for key in QUANTITIES:
            values = [one[key] for one in last]
            assert row[f"{key}_average"] == pytest.approx(statistics.fmean(values), rel=ROUNDING)
            # Independent draws at each measurement.
            error = math.hypot(*(one[f"{key}_stderr"] for one in last)) / len(last)
            if key == "step_sharpness":  # one batch has no error of its own: the scatter over the steps
                error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
            assert row[f"{key}_average_stderr"] == pytest.approx(error, rel=ROUNDING, nan_ok=True)


def test_the_keys_are_there_only_where_wanted() -> None:
    assert not [key for key in list(monitor(*QUANTITIES).keys()) if "average" in key]
    follow = monitor(*QUANTITIES, average_over=2)
    assert [key for key in list(follow.keys()) if "average" in key] == [
        f"{key}_average{end}" for key in QUANTITIES for end in ("", "_stderr")
    ]
    (row, *_) = fit(follow).rows.values()
    assert set(row) >= set(follow.keys())


@pytest.mark.parametrize("over", [1, 4, 100])
def test_each_measurement_draws_what_the_mean_needs(over: int) -> None:
    """Its relative standard error may be √m times as large, down to the fewest draws."""
    goal = 0.05
    options = {"relative_error": goal, "min_batches": 4, "num_batches": 400}
    for row in fit(monitor("batch_sharpness", average_over=over, **options)).rows.values():
        count, error = row["batch_sharpness_batches"], row["batch_sharpness_stderr"] / row["batch_sharpness"]
        assert error <= goal * math.sqrt(over) or count == 400
        if over == 100:
            assert count <= 8


def test_a_measurement_without_a_value_changes_no_mean() -> None:
    means = RunningMeans(3)
    assert means.add({"a": math.nan, "a_stderr": math.nan}, ["a"]) == pytest.approx(
        {"a_average": math.nan, "a_average_stderr": math.nan}, nan_ok=True
    )
    means.add({"a": 1.0, "a_stderr": 0.3}, ["a"])
    found = means.add({"a": 2.0, "a_stderr": 0.4}, ["a"])
    assert found == pytest.approx({"a_average": 1.5, "a_average_stderr": 0.25})
    assert means.add({"a": math.nan, "a_stderr": math.nan}, ["a"]) == found


def test_coverage_of_the_mean() -> None:
    """Of 1,000 runs the mean's interval of two standard errors misses the truth in one of twenty, as a normal one does.

    Eight draws a measurement: their error has seven degrees of freedom, and over ten measurements it is a mean of ten.
    A hundred more than the 46 expected would be twelve standard deviations of the count (√(1000 · 0.046) ≈ 7).
    """
    generator = torch.Generator().manual_seed(0)
    missed = 0
    for _ in range(1000):
        means, found = RunningMeans(10), dict[str, float]()
        for _ in range(10):
            draws = torch.randn(8, generator=generator, dtype=torch.float64) * 0.3 + 1.0
            found = means.add({"a": float(draws.mean()), "a_stderr": float(draws.std()) / math.sqrt(8)}, ["a"])
        missed += abs(found["a_average"] - 1.0) > 2.0 * found["a_average_stderr"]
    assert 30 <= missed <= 75


def test_means_go_through_a_checkpoint(tmp_path: Path) -> None:
    def run(name: str, epochs: int, ckpt: Path | None = None) -> dict[int, dict[str, float]]:
        torch.manual_seed(0)
        capture, keep = Capture(), ModelCheckpoint(tmp_path / name, save_last=True)
        follow = monitor("batch_sharpness", average_over=4, every_n_train_steps=1, num_batches=8, min_batches=4)
        trainer = make_trainer(follow, keep, logger=capture, max_epochs=epochs, enable_checkpointing=True)
        trainer.fit(learner(), loader(), ckpt_path=ckpt)
        return rows(capture)

    whole = run("whole", 3)
    run("part", 1)
    resumed = run("rest", 3, tmp_path / "part" / "last.ckpt")
    # The loader shuffles, and the second epoch of the resumed run has another order from its first step on.
    first = min(resumed)
    assert first == 4
    assert repr(whole[first]) == repr(resumed[first])
