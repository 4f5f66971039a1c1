"""``objective=`` under manual optimization, with one optimizer and with the two of a GAN, against dense matrices."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_curvature import BatchSharpnessMonitor, DirectionalCurvatureMonitor, HessianSpectrumMonitor
from tests.helpers.games import BATCHES, LR, PLAYERS, TOLERANCE, Gan, Player, data
from tests.helpers.manual import Manual, momentum
from tests.helpers.runs import Batch, Step, classification, mlp, rows, run
from tests.helpers.witness import assert_same, copies, watch
from tests.oracles.along_step import EXACT, check, check_row, monitors
from tests.oracles.dense import Part, reference
from tests.oracles.hessian_spectrum import Curvature, Moment, check_eigenvalue
from tests.oracles.hessian_spectrum import Part as MicroBatch

Game = dict[str, Tensor]


class Referee(pl.Callback):
    """Notes the game at the start and the end of each batch, and at the step of one player."""

    def __init__(self, player: Player) -> None:
        self.player = player
        self.starts, self.at_steps, self.ends = list[Game](), list[Game](), list[Game]()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.starts.append(noted(pl_module))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if optimizer is trainer.optimizers[PLAYERS.index(self.player)]:
            self.at_steps.append(noted(pl_module))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.ends.append(noted(pl_module))

    def step(self, index: int) -> tuple[nn.Module, Step]:
        """What the player moved at one batch, with the other as it was then."""
        batch = data()[index]
        network, x, y = again(self.at_steps[index]).task(self.player, batch)
        before = {name: p.detach() for name, p in network.named_parameters()}
        end = dict(again(self.ends[index]).task(self.player, batch)[0].named_parameters())
        # The generator's loss goes through the critic, which is not the generator's to move.
        after = {n: before[n] if is_critic_s(self.player, n) else end[n].detach() for n in before}
        return network, Step([Part(x, y, torch.get_rng_state(), {})], before, after, LR)

    def dense(self, index: int, batch: Batch) -> tuple[Curvature, MicroBatch]:
        """Dense matrices of one batch at the start of another, of the player's own parameters."""
        network, x, y = again(self.starts[index]).task(self.player, batch)
        theta = {name: p.detach() for name, p in network.named_parameters()}
        own = [name for name in theta if not is_critic_s(self.player, name)]
        return Curvature(network, F.binary_cross_entropy_with_logits, Moment(theta, {}, {}), own), MicroBatch(x, y)


def noted(module: Gan) -> Game:
    return {name: p.clone() for name, p in module.state_dict().items()}


def again(game: Game) -> Gan:
    module = Gan()
    module.load_state_dict(game)
    return module


def is_critic_s(player: Player, name: str) -> bool:
    return player == "generator" and name.startswith("1.")


def play(player: Player, monitor: Any, **options: Any) -> tuple[list[dict[str, float]], Referee]:
    """The monitor's rows of a game that is the same without it."""
    referee = Referee(player)
    follow = monitor(
        every_n_train_steps=1,
        objective=lambda module, batch: module.player_loss(player, batch),
        optimizer_index=PLAYERS.index(player),
        on_error="raise",
        **options,
    )
    watched = watch(Gan, lambda: copies(data()), follow, lambda: [referee])
    assert_same(watch(Gan, lambda: copies(data()), None, lambda: [Referee(player)]), watched)
    found = list(rows(watched.logger).values())
    assert len(found) == len(referee.starts) == BATCHES
    return found, referee


@pytest.mark.parametrize("player", PLAYERS)
def test_directional(player: Player) -> None:
    """Each step in the game as it stood at that step, also where the other player has moved since."""
    found, referee = play(player, DirectionalCurvatureMonitor, estimators=("hvp", "finite_difference"))
    for index, row in enumerate(found):
        network, step = referee.step(index)
        loss = F.binary_cross_entropy_with_logits
        check_row(row, reference(network, loss, step.parts, step.before, step.after, gauss_newton=False), step)


@pytest.mark.parametrize("player", PLAYERS)
@pytest.mark.slow
def test_spectrum(player: Player) -> None:
    """Of all the data, at the start of each batch, before either has stepped."""
    found, referee = play(player, HessianSpectrumMonitor, k=2, tolerance=TOLERANCE)
    for index, row in enumerate(found):
        # All batches are of one size.
        parts = [referee.dense(index, batch) for batch in data()]
        matrix = torch.stack([curvature.hessian([part]) for curvature, part in parts]).mean(dim=0)
        check_eigenvalue(row, "lambda_max", matrix, 0, TOLERANCE)
        check_eigenvalue(row, "lambda_2", matrix, 1, TOLERANCE)


@pytest.mark.parametrize("player", PLAYERS)
def test_sharpness(player: Player) -> None:
    """Of the coming batch, before either has stepped; and λ_gen of the Adam that belongs to the player."""
    quantities = ("step_sharpness", "lambda_gen", "batch_sharpness")
    found, referee = play(player, BatchSharpnessMonitor, quantities=quantities, num_batches=4, min_batches=4)
    for index, row in enumerate(found):
        curvature, part = referee.dense(index, data()[index])
        loss = lambda theta, c=curvature, p=part: c.loss(c.outputs(theta, p), p.y)  # noqa: E731
        g = torch.autograd.functional.jacobian(loss, curvature.theta)
        truth = float(g @ curvature.hessian([part]) @ g / (g @ g))
        assert row["step_sharpness"] == pytest.approx(truth, rel=EXACT)
        assert math.isfinite(row["batch_sharpness"])
        # Four updates may go uphill together; then there is none.
        assert not math.isinf(row["lambda_gen"])
        assert row["two_over_lr"] == 2.0 / LR
    assert any(math.isfinite(row["lambda_gen"]) for row in found)


@pytest.mark.parametrize("window", [1, 3])
def test_one_optimizer_by_hand(window: int) -> None:
    """A loss over N in every batch, a step every N batches: the objective's mean over the window."""
    follow = monitors(objective=lambda m, b: {"loss": m.loss(m(b[0]), b[1]), "outputs": m(b[0])})
    check(run(Manual(mlp(4, 6, 3), momentum, window), classification(3 * window), *follow), steps=3)
