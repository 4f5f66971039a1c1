"""A measurement that fails in the stage that is asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator

import pytest

from lightning_curvature.stabilization.problem import StabilizationProblem
from tests.helpers.stabilization import Trap, Trapped


@pytest.fixture
def trapped(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], Trapped]:
    """Makes a module that fails in a stage of the first measurement."""
    timed, made = StabilizationProblem.timed, list[Trapped]()

    @contextlib.contextmanager
    def noted(problem: StabilizationProblem, stage: str) -> Generator[None, None, None]:
        with timed(problem, stage):
            made[-1].trap()[0] = int(stage == Trap.stage)
            yield

    def make(stage: str | None) -> Trapped:
        Trap.stage = stage
        made.append(Trapped())
        return made[-1]

    monkeypatch.setattr(StabilizationProblem, "timed", noted)
    return make
