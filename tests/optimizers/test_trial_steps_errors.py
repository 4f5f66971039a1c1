"""Trial updates that cannot be made: refusals, failing steps, and what they leave behind."""

import contextlib
import functools
import linecache
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lightning_curvature.optimizers.trial_steps import TrialSteps
from tests.helpers.faults import Fault, Tracer
from tests.helpers.runs import make_trainer
from tests.helpers.trial_steps import Hoarder, Lookahead, Make, Plain, Run, fingerprint


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
            match=r"which steps on dense gradients alone, got Failing \(RuntimeError: no more\): train with",
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


class Huge(Plain):
    def step(self, closure: Any = None) -> None:
        torch.empty(2**60)


def test_a_lack_of_memory_on_a_cpu_neither(trainer: pl.Trainer) -> None:
    run = Run(Huge, 0)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        TrialSteps(trainer, run.optimizer, run.parameters).update_for(run.gradient(1))


def test_no_fault_of_ours_is_the_optimizer_s(trainer: pl.Trainer) -> None:
    """A fault at any line, once, leaves nothing behind, and one of the optimizer's own code alone speaks of it."""
    run = Run(Hoarder, 1)
    trials, gradient, before = TrialSteps(trainer, run.optimizer, run.parameters), run.gradient(1), fingerprint(run)

    def traced(tracer: Tracer) -> None:
        sys.settrace(tracer)
        try:
            trials.update_for(gradient)
        finally:
            sys.settrace(None)

    clean, blamed = Tracer(), set()
    traced(clean)
    near = {line: count for line, count in clean.visits.items() if Path(line[0]).stem in ("trial_steps", "snapshot")}
    for line, visit in {(line, visit) for line, count in near.items() for visit in (1, count)}:
        try:
            traced(Tracer((line, visit)))
        except MisconfigurationException:
            blamed.add(linecache.getline(*line).strip())
        except Fault:
            pass
        assert fingerprint(run) == before, (line, visit)
    assert blamed == {"return function(*args)"}


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
    with pytest.raises(
        MisconfigurationException, match=rf"on dense gradients alone, got {reason}.*leave 'lambda_gen' and"
    ):
        trials.update_for(run.gradient(1)[12:])
    assert fingerprint(run) == before


class Tied(Plain):
    """Calls what a test ties to one of its parameters."""

    kept: Any = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step()
        for p in self.trained():
            if isinstance(self.kept, dict) and id(p) in self.kept:
                p.mul_(self.kept[id(p)].mul_(0.9))
        if not isinstance(self.kept, dict):
            self.kept()


def _by_id(optimizer: Any, p: Tensor) -> None:
    optimizer.kept = {id(p): torch.ones(())}


def _in_a_function(optimizer: Any, p: Tensor) -> None:
    count = 0

    def move() -> None:
        nonlocal count
        count += 1
        p.div_(1 + count)
        move.calls = getattr(move, "calls", 0) + count  # type: ignore[attr-defined]
        p.sub_(move.calls)  # type: ignore[attr-defined]

    optimizer.kept = move


def _in_a_default(optimizer: Any, p: Tensor) -> None:
    optimizer.kept = lambda x=p, calls=[]: (calls.append(1), x.div_(1 + len(calls)))


def _in_a_partial(optimizer: Any, p: Tensor) -> None:
    factors = [0.5]
    optimizer.kept = functools.partial(lambda x, y: (p.mul_(x[0]), x.append(0.3), x.pop(0), y.mul_(0.5)), factors, y=p)


def _in_a_method(optimizer: Any, p: Tensor) -> None:
    optimizer.kept = p.zero_


def _in_a_compiled_method(optimizer: Any, p: Tensor) -> None:
    optimizer.compiled = torch.compile(optimizer.step)
    optimizer.kept = p.zero_


def _weakly(optimizer: Any, p: Tensor) -> None:
    reference = weakref.ref(p)
    optimizer.kept = lambda: reference().mul_(0.5)


TIES = [_by_id, _in_a_function, _in_a_default, _in_a_partial, _in_a_method, _in_a_compiled_method, _weakly]


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("tie", TIES)
@pytest.mark.thinned(3)
def test_what_an_optimizer_ties_to_its_parameters_makes_the_right_update(
    trainer: pl.Trainer, tie: Callable[..., None], inside: bool
) -> None:
    """A copy of the optimizer would share these with the run."""

    def make(params: Any) -> Any:
        optimizer = Tied(params)
        tie(optimizer, params[0]["params"][0])
        return Lookahead(optimizer) if inside else optimizer

    run, other = Run(make, 1), Run(make, 1)
    gradient = run.gradient(1)
    before = fingerprint(run)
    trials = TrialSteps(trainer, run.optimizer, run.parameters)
    updates = [trials.update_for(gradient) for _ in range(2)]
    assert fingerprint(run) == before
    made = other.real_update(gradient)
    for update in (*updates, run.real_update(gradient)):  # the real step last: what is tied was not moved either
        assert torch.equal(update, made)
    assert made.any()


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
