"""Wrong values for every argument of everything public: each is refused, by one sentence of the package."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import lightning_curvature
from lightning_curvature.operators import Curvature
from tests.helpers.campaign import attempt, other_forms, outcomes
from tests.helpers.good_calls import CALLS, NOT_CALLED, Good
from tests.helpers.wrong_values import Wrong, wrong_values

ROOMS = ("callbacks", "metrics", "functional", "functional.noise", "linalg", "operators")
# float32 rounds a number; the others are the same number.
ROUNDED = "np.float32"


def public_names() -> set[str]:
    modules = [importlib.import_module(f"lightning_curvature.{room}") for room in ROOMS]
    return {name for module in (lightning_curvature, *modules) for name in module.__all__}


def test_everything_public_is_tried() -> None:
    assert public_names() == {name for name in CALLS if "." not in name} | NOT_CALLED


@pytest.mark.parametrize("name", CALLS)
def test_wrong_values_are_refused(name: str) -> None:
    found = list(outcomes(name, CALLS[name]))
    assert [str(one) for one in found if one.result not in ("refused", "allowed")] == []


@pytest.mark.parametrize("name", CALLS)
def test_numbers_come_in_all_forms(name: str) -> None:
    good = CALLS[name]
    plain = good()
    for argument, form in other_forms(good):
        found = good(**{argument: form.value})
        # Results that compare as numbers, and do not come from random ones.
        if isinstance(plain, float) and form.kind != ROUNDED and "haar" not in name:
            torch.testing.assert_close(found, plain, rtol=1e-6, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("name", ["HessianSpectrumMonitor", "StabilizationMonitor"])
def test_a_loader_is_not_read(name: str) -> None:
    """It may have a state, and need not have a length."""
    CALLS[name](probe_dataloader=Unread())
    with pytest.raises(ValueError, match=r"^probe_dataloader must be one dataloader, .*, got an? int: give"):
        CALLS[name](probe_dataloader=3)


class Unread:
    """A loader that is not to be read when a monitor is made."""

    def __iter__(self) -> Iterator[None]:
        raise AssertionError


def shout(loud: int) -> None:
    """What a function without checks does."""
    if loud < 0:
        raise ValueError("loud must not be negative, got less: give more.")
    torch.ones(loud)


@pytest.mark.parametrize(
    ("value", "result"), [(3, "accepted"), ("3", "bare"), (-1, "bare"), (2.5, "bare"), (math.nan, "bare")]
)
def test_an_unchecked_function_is_found(value: Any, result: str) -> None:
    """A sentence counts only where the package has said it."""
    assert attempt(Good(shout, lambda: {"loud": 1}), "loud", value)[0] == result


def endless(count: int) -> None:
    while count:
        pass


def test_an_endless_call_is_found() -> None:
    assert attempt(Good(endless, lambda: {"count": 0}), "count", 1, seconds=1)[0] == "hung"


@pytest.mark.parametrize(
    ("hint", "good", "kinds"),
    [
        (int, 1, {"None", "True", "NaN", "a fraction", "huge", "negative", "zero", "text", "a vector"}),
        (float | None, 1.0, {"True", "NaN", "infinity", "complex", "NumPy bool"}),
        (Curvature, "hessian", {"a misspelt name", "an empty name", "an unhashable name", "a set", "None"}),
        (torch.Tensor, torch.ones(2, 2), {"a list", "complex", "bool", "scalar", "empty", "one row more", "an array"}),
    ],
)
def test_wrong_values_follow_annotations(hint: Any, good: Any, kinds: set[str]) -> None:
    found = [wrong for wrong in wrong_values(hint, good) if isinstance(wrong, Wrong)]
    assert kinds <= {wrong.kind for wrong in found}
    assert "None" in {wrong.kind for wrong in found} or hint == float | None
