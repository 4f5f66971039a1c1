"""Each kind of sentence, of runs in which it is known to be true."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from lightning_curvature.report.series import Points, Series, series_of
from lightning_curvature.report.words import (
    course_sentence,
    edge_sentence,
    measured,
    near_since,
    number,
    three_sentences,
    trust_sentence,
)
from tests.helpers.logged import Curves, run_of


def logged(curves: Curves) -> Series:
    return series_of(
        run_of({name if "loss" in name else f"curvature/{name}": v for name, v in curves.items()}), "curvature"
    )


def with_share(values: Sequence[float], **others: Sequence[float]) -> Series:
    """λ_dir at an edge of 2, so that its share is half of it."""
    return logged({"lambda_dir": [2.0 * v for v in values], "two_over_lr": [2.0] * len(values), **others})


@pytest.mark.parametrize(
    ("shares", "sentence"),
    [
        (
            [0.1, 0.2, *[1.0] * 8],
            "From step 2 on, λ_dir over 2/η was at 0.9 or more in 8 of 8 finite values; the last is 1 at step 9.",
        ),
        (
            [0.95, *[1.0] * 4, 0.1, *[1.1] * 14],
            "From its first value on, λ_dir over 2/η was at 0.9 or more in 19 of 20 finite values; the last is 1.1 at "
            "step 19.",
        ),
        (
            [0.1, 0.5, 0.3, math.nan, 0.2],
            "λ_dir over 2/η stayed below 0.9 in all 4 finite values: it was at most 0.5, at step 1, and is "
            "0.2 at step 4.",
        ),
        (
            [0.1, 1.3, 1.0, 0.3, 0.2, math.nan],
            "λ_dir over 2/η was at 0.9 or more in 2 of 5 finite values, first at step 1 and last at step 2: its "
            "largest is 1.3 at step 1, its last 0.2 at step 4.",
        ),
        (
            # Near at the end, but too few to tell that it stays.
            [0.1, 0.2, 0.3, 1.0],
            "λ_dir over 2/η was at 0.9 or more in 1 of 4 finite values: its largest is 1 at step 3, its "
            "last 1 at step 3.",
        ),
        ([0.4], "λ_dir over 2/η was measured once, and is 0.4 at step 0, below the edge at 1."),
        (
            [math.nan, math.nan],
            "No share of the edge of stability was logged, so that the logs do not say how near to it the run is.",
        ),
    ],
)
def test_where_the_run_stands(shares: list[float], sentence: str) -> None:
    assert edge_sentence(with_share(shares)) == sentence


def test_the_edge_ratio_speaks_before_others() -> None:
    one = with_share([0.1] * 6, edge_ratio=[1.0] * 6)
    assert edge_sentence(one).startswith("From its first value on, the edge ratio was at 0.9 or more in 6 of 6 finite")
    unknown = with_share([0.1] * 6, edge_ratio=[math.nan] * 6)
    assert edge_sentence(unknown).startswith("λ_dir over 2/η stayed below 0.9")
    threshold = logged({"lambda_max": [1.0], "lambda_max_threshold": [4.0]})
    assert edge_sentence(threshold).startswith("λ_max over its threshold was measured once, and is 0.25")


@pytest.mark.parametrize("seed", range(5))
def test_near_since_is_the_first_such_place(seed: int) -> None:
    values = np.random.default_rng(seed).uniform(0.0, 2.0, 60)
    values[40:] = np.maximum(values[40:], 0.9 if seed else 0.0)
    kept = [i for i in range(56) if values[i] >= 0.9 and np.mean(values[i:] >= 0.9) >= 0.9]
    assert near_since(values) == (kept[0] if kept else None)


@pytest.mark.parametrize(
    ("curves", "sentence"),
    [
        (
            {"lambda_dir": [1.0, 2.0], "train_loss": [2.0, 1.0]},
            "λ_dir rose, from 1 at step 0 to 2 at step 1; train_loss fell, from 2 at step 0 to 1 at step 1.",
        ),
        (
            {"lambda_dir": [1.0, 5.0, math.nan, 2.0, math.inf]},
            "λ_dir rose, from 1 at step 0 to 2 at step 3, with its largest 5 at step 1.",
        ),
        (
            {"lambda_dir": [1.0, 1.04]},
            "λ_dir hardly changed between its ends, from 1 at step 0 to 1.04 at step 1.",
        ),
        (
            # A change within its errors is none.
            {"lambda_dir": [1.0, 1.5], "lambda_dir_error": [0.2, 0.4]},
            "λ_dir hardly changed between its ends, from 1 at step 0 to 1.5 ± 0.6 at step 1.",
        ),
        ({"train_loss": [3.0]}, "train_loss was measured once, 3 at step 0."),
        ({"regime": [1.0]}, "Neither a curvature nor a loss was logged."),
    ],
)
def test_how_curvature_and_loss_moved(curves: Curves, sentence: str) -> None:
    assert course_sentence(logged(curves)) == sentence


@pytest.mark.parametrize(
    ("curves", "sentence"),
    [
        ({"lambda_dir": [1.0, 2.0]}, "All 2 logged values are finite; no errors were logged."),
        (
            {"lambda_dir": [1.0, math.nan], "lambda_dir_error": [0.1, math.nan], "two_over_lr": [math.inf, 1.0]},
            "2 of 4 logged values are NaN or infinite, most of them of λ_dir (1 of 2); the median relative error of "
            "λ_dir is 10 %.",
        ),
        (
            {"gni": [math.nan] * 3, "gni_stderr": [math.nan] * 3},
            "3 of 3 logged values are NaN or infinite, all of GNI (3 of 3); no errors were logged.",
        ),
        (
            {
                "regime": [0.0, 5.0, 5.0],
                "regime_alarm": [0.0, 0.0, 0.0],
                "lambda_dir": [1.0],
                "lambda_dir_error": [1e-6],
                "ias": [2.0],
                "ias_stderr": [0.1],
            },
            "The last regime is “edge of stability”, since step 1; there was no alarm; all 2 logged values are finite; "
            "the median relative error of IAS is 5 %, the largest of those logged.",
        ),
        (
            {"regime": [5.0, 6.0], "regime_alarm": [0.0, 1.0]},
            "The last regime is “catapult”, since step 1; there was 1 alarm, at step 1; no value of a monitor was "
            "logged; no errors were logged.",
        ),
        (
            {"regime": [6.0, 6.0, 7.0], "regime_alarm": [1.0, 0.0, 1.0], "lambda_dir": [1.0]},
            "The last regime is “diverging”, since step 2; there were 2 alarms, the first at step 0; the one logged "
            "value is finite; no errors were logged.",
        ),
    ],
)
def test_what_can_be_relied_on(curves: Curves, sentence: str) -> None:
    assert trust_sentence(logged(curves)) == sentence


def test_a_run_has_three_sentences_that_end() -> None:
    said = three_sentences(with_share([0.1, 0.2, 0.3]))
    assert len(said) == 3
    assert all(sentence.endswith(".") and ".." not in sentence for sentence in said)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234.5, "1230"),
        (3.456e8, "3.46·10⁸"),
        (-2e-7, "−2·10⁻⁷"),
        (0.25, "0.25"),
        (1e10, "1·10¹⁰"),
        (math.nan, "NaN"),
        (math.inf, "∞"),
        (-math.inf, "−∞"),
        (0.0, "0"),
    ],
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [(2.0673, 7e-4, "2.067 ± 0.0007"), (12.3, 4.0, "12 ± 4"), (1.0, math.nan, "1"), (0.5, 2.0, "0.5 ± 2")],
)
def test_values_have_the_digits_of_their_errors(value: float, error: float, text: str) -> None:
    assert measured(Points(np.array([0]), np.array([value]), np.array([error]))) == text
