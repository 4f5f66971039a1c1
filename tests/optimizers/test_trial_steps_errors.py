"""Trial updates that cannot be made: refusals, failing steps, and what they leave behind."""

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lightning_curvature.optimizers.trial_steps import TrialSteps
from tests.optimizers.test_trial_steps import OUTSIDE, Hoarder, Make, Plain, Run, fingerprint
from tests.runs import make_trainer


@pytest.fixture
def trainer() -> pl.Trainer:
    return make_trainer()


class Failing(Hoarder):
    def step(self, closure: Any = None) -> None:
        super().step(closure)
        if self.count == 2:
            raise RuntimeError("no more")


def test_an_error_in_the_step_leaves_nothing_behind(trainer: pl.Trainer) -> None:
    run, heard = Run(Failing, 1), []
    handle = register_optimizer_step_pre_hook(lambda *args: heard.append(args))
    try:
        before = fingerprint(run)
        with pytest.raises(
            MisconfigurationException,
            match=r"whose copy steps on dense gradients alone, got Failing \(RuntimeError: no more\): train with",
        ):
            TrialSteps(trainer, run.optimizer, run.parameters).update_for(run.gradient(1))
        assert fingerprint(run) == before
        assert heard == []
        with contextlib.suppress(RuntimeError):
            run.optimizer.step()
        assert heard  # the hook is back
    finally:
        handle.remove()


class Exhausted(Plain):
    def step(self, closure: Any = None) -> None:
        raise torch.OutOfMemoryError("all gone")


def test_a_lack_of_memory_is_not_the_optimizer_s_fault(trainer: pl.Trainer) -> None:
    run = Run(Exhausted, 0)
    with pytest.raises(torch.OutOfMemoryError, match="all gone"):
        TrialSteps(trainer, run.optimizer, run.parameters).update_for(run.gradient(1))


class Sharp(Plain):
    def step(self, closure: Any = None) -> None:
        if closure is None:
            raise RuntimeError("a closure is needed")


class Locked(Plain):
    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr)
        self.lock = threading.Lock()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda p: torch.optim.SparseAdam(p[0]["params"]),
            "SparseAdam .RuntimeError: SparseAdam does not support dense",
        ),
        (Sharp, r"Sharp .RuntimeError: a closure is needed"),
        (Locked, r"Locked .TypeError: cannot pickle"),
    ],
)
def test_optimizers_that_fail_are_named(trainer: pl.Trainer, make: Make, reason: str) -> None:
    run = Run(make, 0)
    before = fingerprint(run)
    trials = TrialSteps(trainer, run.optimizer, run.parameters[1:])
    with pytest.raises(MisconfigurationException, match=rf"on dense gradients alone, got {reason}.*leave 'lambda_gen'"):
        trials.update_for(run.gradient(1)[12:])
    assert fingerprint(run) == before


def _by_id(optimizer: Any, p: Tensor) -> None:
    optimizer.kept = {id(p): torch.zeros(2)}


def _in_a_function(optimizer: Any, p: Tensor) -> None:
    optimizer.kept = [lambda: p.zero_()]


def _in_a_default(optimizer: Any, p: Tensor) -> None:
    optimizer.kept = {"zero": lambda x=p: x.zero_()}


def _in_a_partial(optimizer: Any, p: Tensor) -> None:
    optimizer.kept = functools.partial(lambda: p.zero_())


def _in_a_compiled_method(optimizer: Any, p: Tensor) -> None:
    optimizer.kept = torch.compile(optimizer.step)


def _weakly(optimizer: Any, p: Tensor) -> None:
    optimizer.kept = weakref.ref(p)


TIES = [_by_id, _in_a_function, _in_a_default, _in_a_partial, _in_a_compiled_method, _weakly]


@pytest.mark.parametrize("tie", TIES)
def test_what_a_copy_would_share_with_the_run_is_refused(tie: Callable[..., None]) -> None:
    run = Run(OUTSIDE["lookahead"], 0)
    TrialSteps.check(run.optimizer)
    tie(run.optimizer.inner, run.parameters[0])
    with pytest.raises(
        MisconfigurationException, match=r"can be copied .* got Lookahead, whose inner would still refer"
    ):
        TrialSteps.check(run.optimizer)
    run = Run(Plain, 0)
    tie(run.optimizer, run.parameters[0])
    with pytest.raises(
        MisconfigurationException, match=r"got Plain, whose kept would still .* leave 'lambda_gen' out\."
    ):
        TrialSteps.check(run.optimizer)


def test_a_closure_is_refused_at_once() -> None:
    message = (
        r"must step on gradients alone .* got LBFGS, whose step needs closure: train with another optimizer, or leave"
    )
    with pytest.raises(MisconfigurationException, match=message):
        TrialSteps.check(torch.optim.LBFGS([nn.Parameter(torch.ones(2))]))


def test_parameters_of_somebody_else_are_refused(trainer: pl.Trainer) -> None:
    run = Run(Plain, 0)
    message = r"among those of the optimizer, got 1 that Plain does not hold: give those of its param_groups\."
    with pytest.raises(MisconfigurationException, match=message):
        TrialSteps(trainer, run.optimizer, [*run.parameters, nn.Parameter(torch.ones(2))])
