"""Two optimizers that step in turn over two sharded submodules (FSDP2), each followed in its own game."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.distributed import game_jobs as jobs
from tests.distributed.game_jobs import Outcome
from tests.helpers.games import BATCHES, PLAYERS
from tests.helpers.processes import needs_fsdp2, run_on_ranks
from tests.helpers.runs import GROUPS

pytestmark = [needs_fsdp2, pytest.mark.slow]

Results = dict[str, list[Outcome]]

# A second difference of losses is taken from three of them, whose roundings of 1e-16 stand against ε²dᵀHd of 5e-4 and
# more: 1e-12. A difference of gradients is within 3e-10 of a product (see operators/differences.py), which counts for
# more where curvatures of both signs are summed. Measured: 2e-12, 5e-11 and 8e-9.
TOLERANCES = {"directional": 1e-10, "spectrum": 1e-6, "sharpness": 1e-6}


@pytest.fixture(scope="module")
def results() -> Any:
    """All games of this file, by one pair of processes."""
    return run_on_ranks(jobs.__name__, [*jobs.GAMES, "unwatched"])


def of_monitor(rows: dict[int, dict[str, float]]) -> dict[int, dict[str, float]]:
    return {step: {k: v for k, v in row.items() if k.startswith(GROUPS)} for step, row in rows.items()}


each_game = pytest.mark.parametrize(
    ("name", "player"), [pytest.param(n, p, id=f"{n}-{p}") for n in jobs.MONITORS for p in PLAYERS]
)


@each_game
def test_values_of_a_sharded_game_are_those_of_one_process(results: Results, name: str, player: str) -> None:
    alone = of_monitor(jobs.GAMES[f"{name}_{player}"]().rows)
    assert len(alone) == BATCHES
    for outcome in results[f"{name}_{player}"]:
        rows = of_monitor(outcome.rows)
        assert rows.keys() == alone.keys()
        for step, expected in alone.items():
            assert any(math.isfinite(v) for k, v in expected.items() if k != "curvature/two_over_lr")
            assert rows[step].keys() == expected.keys()
            for key, value in expected.items():
                # Residuals are small beside what they are residuals of.
                size = 1.0 if name == "spectrum" and key.endswith("_error") else abs(value)
                tolerance = TOLERANCES[name] * size
                assert rows[step][key] == pytest.approx(value, rel=0.0, abs=tolerance, nan_ok=True), (step, key)


def test_players_are_not_one(results: Results) -> None:
    for name, key in (("directional", "lambda_fd"), ("spectrum", "lambda_max"), ("sharpness", "step_sharpness")):
        one, other = (results[f"{name}_{player}"][0].rows[1][f"curvature/{key}"] for player in PLAYERS)
        assert abs(one / other - 1.0) > 0.1, name


@each_game
def test_a_sharded_game_is_the_same_to_the_bit(results: Results, name: str, player: str) -> None:
    """Both players' weights and the states of both optimizers."""
    for watched, unwatched in zip(results[f"{name}_{player}"], results["unwatched"], strict=True):
        assert watched.state.keys() == unwatched.state.keys()
        assert {"generator.0.weight", "critic.2.bias", "0 0 exp_avg", "1 3 exp_avg_sq"} <= watched.state.keys()
        for key, value in watched.state.items():
            assert torch.equal(value, unwatched.state[key]), key


def test_parameters_are_in_shards(results: Results) -> None:
    for key, sizes in (("generator.2.weight", [2, 1]), ("critic.2.weight", [1, 0])):
        assert [len(outcome.state[key]) for outcome in results["unwatched"]] == sizes
