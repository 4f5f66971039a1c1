"""Runs that go on from a checkpoint, wherever it was made, log what the unbroken run does; also after SIGKILL."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_curvature.monitors.base import Monitor
from tests.compatibility.monitors import EVERY, MONITORS
from tests.helpers.counting import out_of_reach
from tests.helpers.runs import Batch, Capture, Classifier, Outcome, StepRecorder, classification, make_trainer, rows
from tests.helpers.witness import frozen
from tests.oracles.along_step import EXACT, check, monitors
from tests.oracles.hessian_spectrum import Curvature, Moment
from tests.oracles.hessian_spectrum import Part as MicroBatch

BATCHES, EPOCHS = 4, 2


class Stateful(DataLoader[Any]):
    """In a fixed order, and goes on where a checkpoint left it; any other would begin the epoch's data again."""

    def __init__(self) -> None:
        super().__init__(classification(BATCHES), batch_size=None, shuffle=False)  # type: ignore[arg-type]
        self.begin = self.done = 0

    def __iter__(self) -> Iterator[Any]:
        self.done, self.begin = self.begin, 0
        for batch in list(super().__iter__())[self.done :]:
            self.done += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done % BATCHES}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.begin = state_dict["done"]


class Mortal(Classifier):
    """With running statistics and a schedule; may kill its own process in the second repetition of some step."""

    def __init__(self, kill_at: int | None = None) -> None:
        torch.manual_seed(0)
        layers = [nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)]
        super().__init__(nn.Sequential(*layers).double(), scheduled)
        repetitions = out_of_reach([])

        def kills(step: int) -> bool:
            repetitions().append(step)
            return repetitions().count(step) == 2 and step == kill_at

        self.kills = kills

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        # A repeated step sees a stand-in for the Trainer.
        if type(self._trainer) is not pl.Trainer and self.kills(self.global_step):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(batch, batch_idx)


def scheduled(module: nn.Module) -> Any:
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class EveryBatch(pl.Callback):
    """Saves a checkpoint after every batch, also inside a window of accumulated ones."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.fit_loop.epoch_loop.total_batch_idx + 1}.ckpt")


def fit(*callbacks: pl.Callback, resume: Path | None = None, module: Any = None, **options: Any) -> Outcome:
    capture, recorder, module = Capture(), StepRecorder(), module or Mortal()
    trainer = make_trainer(recorder, *callbacks, logger=capture, max_epochs=EPOCHS, **options)
    trainer.fit(module, Stateful(), ckpt_path=None if resume is None else str(resume))
    return Outcome(trainer, module, capture, recorder.steps)


def state(outcome: Outcome) -> Any:
    """Weights, statistics, optimizer and schedule at the end."""
    trainer = outcome.trainer
    own = [trainer.optimizers[0].state_dict(), trainer.lr_scheduler_configs[0].scheduler.state_dict()]
    return frozen([outcome.module.state_dict(), *own])


def logged(outcome: Outcome, begin: int = 0) -> str:
    """All values from a step on; NaN equals itself as a string."""
    return str({step: row for step, row in rows(outcome.capture).items() if step >= begin})


pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_curvature.CurvatureWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),
]


def make(name: str) -> Monitor:
    """One of all quantities. A search that ends early depends the more on what it began with."""
    early: dict[str, Any] = {"max_products": 20, "tolerance": 0.1} if name == "spectrum" else {}
    return MONITORS[name].thorough(**early)


@pytest.fixture(scope="module")
def unbroken_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Outcome, Path]]:
    """A run to its end and its checkpoints, made once for each monitor."""

    @functools.cache
    def run(name: str) -> tuple[Outcome, Path]:
        folder = tmp_path_factory.mktemp(f"unbroken_{name}")
        return fit(make(name), EveryBatch(folder)), folder

    return run


@pytest.mark.parametrize("name", MONITORS)
@pytest.mark.slow
def test_from_any_step(name: str, unbroken_run: Callable[[str], tuple[Outcome, Path]]) -> None:
    """At the ends of epochs and inside them, at measured steps, before and after them."""
    unbroken, folder = unbroken_run(name)
    assert list(rows(unbroken.capture)) == [0, 3, 6]
    for done in range(1, BATCHES * EPOCHS):
        resumed = fit(make(name), resume=folder / f"{done}.ckpt")
        assert len(resumed.steps) == BATCHES * EPOCHS - done
        assert state(resumed) == state(unbroken)
        assert logged(resumed) == logged(unbroken, done), done


@pytest.mark.parametrize("name", MONITORS)
@pytest.mark.slow
def test_from_the_middle_of_a_window(name: str, tmp_path: Path) -> None:
    """Lightning forgets the gradients of the window's first batch: the step is that of the second, and so is its λ."""
    two: Any = {"accumulate_grad_batches": 2}
    always: Any = {"every_n_train_steps": 1}
    unbroken = fit(MONITORS[name].thorough(**always), EveryBatch(tmp_path), **two)
    follow = monitors() if name == "directional" else [MONITORS[name].thorough(**always)]
    resumed, plain = (fit(*m, resume=tmp_path / "5.ckpt", **two) for m in (follow, []))
    assert state(resumed) == state(plain) != state(unbroken)
    assert [len(step.parts) for step in resumed.steps] == [1, 2]
    found, before = rows(resumed.capture), rows(unbroken.capture)
    assert list(found) == [2, 3]
    if name in ("stabilization", "noise"):
        return  # in eval mode, by the running statistics that the first batch has moved
    if name == "directional":
        check(resumed, steps=2)
        return
    assert found[2].keys() == before[2].keys()
    for key in found[2]:
        # The window began at the same θ: the same spectrum, by a search that begins nearer and ends within residuals of
        # 1e-6, and the same draws. The coming step is another.
        if not key.startswith("step_") and not key.endswith(("_error", "_upper")) and "trace" not in key:
            assert found[2][key] == pytest.approx(before[2][key], rel=1e-9, nan_ok=True), key
    if name == "sharpness":
        assert found[2]["step_sharpness"] == pytest.approx(of_one_batch(resumed), rel=EXACT)


def of_one_batch(outcome: Outcome) -> float:
    """gᵀHg/‖g‖² of the batch that the first step was made of."""
    (part,), module = outcome.steps[0].parts, outcome.module
    moment = Moment(outcome.steps[0].before, part.buffers, {})
    curvature, batch = Curvature(module.network, module.loss, moment), MicroBatch(part.x, part.y)
    g = torch.autograd.functional.jacobian(lambda p: module.loss(curvature.outputs(p, batch), part.y), curvature.theta)
    return float(g @ curvature.hessian([batch]) @ g / (g @ g))


def until_killed(name: str, folder: Path) -> None:
    """A run that never ends."""
    torch.set_num_threads(1)
    checkpoints = ModelCheckpoint(folder, filename="last", every_n_train_steps=1, enable_version_counter=False)
    fit(make(name), checkpoints, module=Mortal(kill_at=EVERY), enable_checkpointing=True)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What was on disk when a process died in the middle of a probe; all of them at once."""
    folders = {name: tmp_path_factory.mktemp(name) for name in MONITORS}
    # One process imports torch and this file, which takes seconds, and forks the others.
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([__name__])
    children = [server.Process(target=until_killed, args=item) for item in folders.items()]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [-signal.SIGKILL] * len(children)
    return folders


@pytest.mark.parametrize("name", MONITORS)
@pytest.mark.slow
def test_killed_in_the_middle_of_a_probe(
    name: str, killed: dict[str, Path], unbroken_run: Callable[[str], tuple[Outcome, Path]]
) -> None:
    """Nothing of what a probe had perturbed is in the file, and the next process goes on as if there had been one."""
    (path,) = killed[name].iterdir()
    assert torch.load(path, weights_only=True)["global_step"] == EVERY
    resumed, (unbroken, _) = fit(make(name), resume=path), unbroken_run(name)
    assert state(resumed) == state(unbroken)
    assert list(rows(resumed.capture)) == [3, 6]
    assert logged(resumed) == logged(unbroken, EVERY)
