"""A rule on an argument: what it lets through, in which form, and its sentence."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_curvature.arguments import Rule, checked, fraction, not_negative, positive, shaped, whole
from lightning_curvature.arguments.check import Check

pytestmark = pytest.mark.check

PLAIN = [
    (int, whole(1, "3"), np.int64(3), 3),
    (int, whole(1, "3"), torch.tensor([3]), 3),
    (float, None, np.float32(0.5), 0.5),
    (float, None, torch.tensor(0.5), 0.5),
    (float, None, 3, 3),
    (float, None, 2**60, float(2**60)),
    (float | None, None, None, None),
    (float | Literal["auto"], None, "auto", "auto"),
    (bool | Literal["auto"], None, False, False),
    (Sequence[int], None, [np.int64(3), 1], (3, 1)),
    (Sequence[int], Rule(single=True), 3, (3,)),
    (Sequence[Literal["a", "b"]], None, ["b", "a", "b"], ("b", "a")),
    (Tensor | float, not_negative("0"), 0.0, 0.0),
]
BROKEN = [
    (int, whole(1, "take 3"), True, "x must be a whole number of at least 1, got True: take 3."),
    (int, whole(1, "take 3"), 2.0, "x must be a whole number of at least 1, got 2.0: take 3."),
    (int, whole(1, "take 3", most=9), 10**30, f"x must be a whole number of at most 9, got {10**30}: take 3."),
    (int, whole(1, "take 3"), 2**63, f"x must be a whole number of at most {2**63 - 1}, got {2**63}: take 3."),
    (float, positive("take 1"), torch.tensor(-1.0), "x must be positive and finite, got -1.0: take 1."),
    (float, positive("take 1"), 10**400, "x must be positive and finite, got an int: take 1."),
    (float, fraction("take 1"), math.nan, "x must lie between 0 and 1, got nan: take 1."),
    (float, Rule("take 1", least=0.0, below=1.0), 1.0, "x must lie in [0, 1), got 1.0: take 1."),
    (float, Rule("take 1", above=0.0, most=1.0), 0, "x must lie in (0, 1], got 0: take 1."),
    (float, Rule("take 1", below=1.0), 2, "x must be below 1, got 2: take 1."),
    (float | None, not_negative("0"), -1, "x must be finite and not negative, or None, got -1: 0."),
    (Literal["kl", "hvp"], None, "kll", "x must be 'kl' or 'hvp', got 'kll' (did you mean 'kl'?): give one of them."),
    (Literal["kl", "hvp"], None, ["kl"], "x must be 'kl' or 'hvp', got ['kl']: give one of them."),
    (
        Sequence[Literal["kl", "hvp"]],
        None,
        ["hvpp"],
        "x must be names from ('kl', 'hvp'), got 'hvpp' (did you mean 'hvp'?): correct or remove it.",
    ),
    (
        Sequence[Literal["kl", "hvp"]],
        None,
        {"kl"},
        "x must be a non-empty sequence of names, got {'kl'}: choose from ('kl', 'hvp').",
    ),
    (Callable[[], int], Rule("write one"), 3, "x must be a callable, got an int: write one."),
    (torch.Generator | None, None, 3, "x must be a Generator, or None, got an int: make one by Generator(…)."),
    (
        Tensor,
        None,
        [1.0],
        "x must be a real tensor, got [1.0]: make one of integers or floating-point numbers, by torch.as_tensor.",
    ),
    (
        Tensor | float,
        not_negative("0"),
        torch.ones(2, dtype=torch.bool),
        "x must be a number or a real tensor, got a tensor (2,) of torch.bool: 0.",
    ),
    (Tensor | float, positive("1"), 0.0, "x must be positive and finite, got 0.0: 1."),
    (torch.device | str, None, "cup", "x must be a device, got 'cup': give 'cpu' or 'cuda'."),
]  # fmt: skip


@pytest.mark.parametrize(("hint", "rule", "value", "expected"), PLAIN)
def test_plain_forms(hint: Any, rule: Rule | None, value: Any, expected: Any) -> None:
    found = Check(hint, rule)("x", value)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(("hint", "rule", "value", "expected"), BROKEN)
def test_sentences(hint: Any, rule: Rule | None, value: Any, expected: str) -> None:
    with pytest.raises(ValueError) as caught:
        Check(hint, rule)("x", value)
    assert str(caught.value) == expected


def test_a_rule_stands_in_the_annotation() -> None:
    with pytest.raises(ValueError, match=r"^x must be a whole number of at least 2, or None, got 1: take 3\.$"):
        Check(Annotated[int, whole(2, "take 3")] | None)("x", 1)


@checked(a=shaped("n! in"), s=shaped("n out out"), v=shaped("N out*in"))
def product(a: Tensor, s: Tensor, v: Tensor, *, scale: float = math.nan) -> tuple[int, float]:
    return len(v), scale


@checked(z=shaped("... C"), w=shaped("...", bools=True))
def weighted(z: Tensor, w: Tensor | None = None) -> None: ...


GOOD = (torch.ones(4, 3), torch.ones(4, 2, 2), torch.ones(5, 6))


def test_shapes_agree() -> None:
    """A default is no mistake, though no caller may give it."""
    assert product(*GOOD, scale=np.float32(2.0))[1] == 2.0
    assert math.isnan(product(*GOOD)[1])
    weighted(torch.ones(2, 3, 4), torch.ones(2, 3, dtype=torch.bool))
    weighted(torch.ones(4))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.ones(0, 3), *GOOD[1:]), r"a must be \(n, in\) with n ≥ 1, got \(0, 3\): see the shapes in the"),
        ((GOOD[0], torch.ones(4, 2, 3), GOOD[2]), r"s must be \(n, out, out\) with n = 4 of a, got \(4, 2, 3\): see"),
        ((*GOOD[:2], torch.ones(5, 5)), r"v must be \(N, out · in\) with out = 2 of s, in = 3 of a, got \(5, 5\): see"),
        ((GOOD[0][0], *GOOD[1:]), r"a must be \(n, in\) with n ≥ 1, got \(3,\): see"),
    ],
)
def test_shapes_that_disagree(arguments: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"^{words}"):
        product(*arguments)


def test_any_leading_dimensions() -> None:
    with pytest.raises(ValueError, match=r"^w must be \(…\) with … = \(2, 3\) of z, got \(3,\): see"):
        weighted(torch.ones(2, 3, 4), torch.ones(3))
    with pytest.raises(ValueError, match=r"^z must be \(…, C\), got \(\): see"):
        weighted(torch.ones(()))


def test_calls_python_refuses_stay_its_own() -> None:
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'v'"):
        product(*GOOD[:2])  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected keyword argument 'width'"):
        product(*GOOD, width=3)  # type: ignore[call-arg]


def test_values_of_tensors_are_not_read() -> None:
    """Those of the meta device have none."""
    product(*(one.to("meta") for one in GOOD))
    with pytest.raises(ValueError, match=r"^v must be \(N, out · in\) with .*, got \(4, 3\): see"):
        product(*(GOOD[i].to("meta") for i in (0, 1, 0)))
    assert Check(Tensor | float, positive("1"))("x", torch.ones(2, device="meta")).is_meta
