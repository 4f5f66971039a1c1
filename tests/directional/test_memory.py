"""At most two copies of the parameters beside the model's own on a measured step, none between."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lightning_curvature import DirectionalCurvatureMonitor
from tests.helpers.counting import out_of_reach
from tests.helpers.runs import Classifier, classification, loader, make_trainer

# No other tensor of a run has this many elements.
SHAPE = (37, 41)


def big(tensor: Tensor) -> bool:
    return tensor.numel() == SHAPE[0] * SHAPE[1]


def copies_alive(module: nn.Module) -> int:
    """Pieces of memory of the size of the parameter beside its own, however many tensors look at each."""
    # Python's collector knows of a gradient once somebody has looked at it.
    found = {p.grad.untyped_storage().data_ptr() for p in module.parameters() if p.grad is not None and big(p)}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, nn.Parameter) and big(thing):
            found.add(thing.untyped_storage().data_ptr())
    return len(found - {p.untyped_storage().data_ptr() for p in module.parameters()})


class Counting(Classifier):
    """Counts in the middle of every forward, the step's own and those of evaluations."""

    def __init__(self, fails: bool) -> None:
        network = nn.Sequential(nn.Linear(4, SHAPE[1]), nn.Linear(SHAPE[1], SHAPE[0]), nn.Linear(SHAPE[0], 3))
        super().__init__(network.double(), lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9))
        self.fails, self.note = fails, None

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.note("forward") and self.fails:
            raise RuntimeError("no evaluation")
        return y


class Counter(pl.Callback):
    """Notes how many copies are alive, by moment; stands on both sides of the monitor."""

    def __init__(self, counts: dict[str, list[int]]) -> None:
        self.counts = counts

    def note(self, moment: str, module: nn.Module) -> bool:
        """Say whether the batch is over; the module itself could not: its attributes are put back for evaluations."""
        over = len(self.counts.get("batch end", [])) % 2 == 1
        self.counts.setdefault(f"evaluation's {moment}" if over else moment, []).append(copies_alive(module))
        return over

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        kept = out_of_reach(self)
        pl_module.note = lambda moment: kept().note(moment, pl_module)
        self.note("batch start", pl_module)

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        self.note("after backward", pl_module)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.note("before step", pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.counts.setdefault("batch end", []).append(copies_alive(pl_module))


@contextlib.contextmanager
def no_collector() -> Iterator[None]:
    """Leave alive what only the collector would free, and let it list no objects but those made inside."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def counted(monitor: DirectionalCurvatureMonitor | None, fails: bool = False) -> dict[str, list[int]]:
    counts: dict[str, list[int]] = {}
    between = [] if monitor is None else [monitor]
    trainer = make_trainer(Counter(counts), *between, Counter(counts))
    module = Counting(fails)
    with no_collector():
        trainer.fit(module, loader(classification(4)))
    return counts


@functools.cache
def unwatched() -> dict[str, list[int]]:
    return counted(None)


@pytest.mark.filterwarnings("ignore:DirectionalCurvatureMonitor logs NaN")
@pytest.mark.parametrize("fails", [False, True], ids=["", "failing"])
@pytest.mark.parametrize("estimator", ["kl", "finite_difference", "critical", "gauss_newton", "hvp"])
@pytest.mark.slow
def test_copies(estimator: Any, fails: bool) -> None:
    plain = unwatched()
    # Steps 0 and 2 are measured, 1 and 3 are not.
    watched = counted(DirectionalCurvatureMonitor(estimators=(estimator,), every_n_train_steps=2), fails)
    # Its gradient and its momentum.
    assert plain["batch end"] == [2] * 8

    def extra(moment: str) -> list[int]:
        return [w - p for w, p in zip(watched[moment], plain[moment], strict=True)]

    # Two counters note every moment but the forwards, the second after the monitor's turn.
    assert extra("batch start") == [0] * 8
    assert extra("forward") == [0] * 4
    assert extra("after backward") == [0, 1, 0, 0, 0, 1, 0, 0]
    assert extra("before step") == [1, 2, 0, 0, 1, 2, 0, 0]
    assert set(watched["evaluation's forward"]) == {2 + 2}
    assert extra("batch end") == [2, 0, 0, 0, 2, 0, 0, 0]
