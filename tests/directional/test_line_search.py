"""The line search brackets the first rise of the loss, and always ends."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from lightning_curvature.directional.line_search import CRITICAL_TOLERANCE, critical_step


def counted(loss: Callable[[float], float]) -> tuple[Callable[[float], float], list[float]]:
    """The loss, and the lengths at which it was asked for."""
    asked: list[float] = []

    def at(length: float) -> float:
        asked.append(length)
        return loss(length)

    return at, asked


@pytest.mark.parametrize("start", [1e-3, 0.9, 2.0, 3.0, 500.0])
@pytest.mark.parametrize("edge", [0.013, 2.0, 77.0])
def test_the_length_is_where_a_quadratic_loss_is_back_at_its_start(edge: float, start: float) -> None:
    loss, asked = counted(lambda c: 1.0 + c * (c - edge))
    found = critical_step(loss, 1.0, start, max_forwards=60)
    assert not found.capped
    assert found.forwards == len(asked)
    # The bracket holds the edge, and is no wider than a sixteenth of its upper end; the factor is its middle.
    assert abs(found.factor - edge) <= found.half_width * found.factor * (1.0 + 1e-12)
    assert 0.0 < found.half_width <= CRITICAL_TOLERANCE / (2.0 - CRITICAL_TOLERANCE) + 1e-12
    # Doubled or halved until bracketed, then bisected: log₂ of either.
    assert len(asked) <= abs(math.log2(edge / start)) + 2 + 5


def test_the_first_length_is_the_start_and_the_second_twice_or_half_of_it() -> None:
    for edge, second in ((10.0, 6.0), (1.0, 1.5)):
        loss, asked = counted(lambda c, edge=edge: c * (c - edge))  # type: ignore[misc]
        critical_step(loss, 0.0, 3.0, max_forwards=9)
        assert asked[:2] == [3.0, second]


@pytest.mark.parametrize("overflow", [math.nan, math.inf])
def test_a_loss_that_is_no_number_has_risen(overflow: float) -> None:
    found = critical_step(lambda c: overflow if c > 5.0 else -1.0, 0.0, 1.0, max_forwards=30)
    assert abs(found.factor - 5.0) <= found.half_width * found.factor


@pytest.mark.parametrize("loss", [lambda c: -c, lambda c: c])
def test_a_loss_that_never_or_always_rises_ends_at_the_cap(loss: Callable[[float], float]) -> None:
    at, asked = counted(loss)
    found = critical_step(at, 0.0, 1.0, max_forwards=7)
    assert found.capped
    assert found.forwards == len(asked) == 7
    assert math.isnan(found.factor)
    assert math.isnan(found.half_width)


def test_a_bracket_that_the_cap_leaves_wide_is_still_told() -> None:
    """Forwards at 1 and 2 bracket the edge at 1.9: the middle, with the width that is left."""
    found = critical_step(lambda c: c * (c - 1.9), 0.0, 1.0, max_forwards=2)
    assert (found.factor, found.capped, found.forwards) == (1.5, True, 2)
    assert found.half_width == pytest.approx(1.0 / 3.0)
