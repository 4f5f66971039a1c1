"""Trial updates against steps that are really made, and what they must leave alone, bit for bit."""

import copy
import gc
import inspect
import threading
import weakref
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import StepLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lightning_curvature.linalg import VectorSpace
from lightning_curvature.operators.graphs import Graphs
from lightning_curvature.optimizers.trial_steps import TrialSteps
from tests.helpers.counting import out_of_reach
from tests.helpers.runs import make_trainer
from tests.helpers.trial_steps import Hoarder, Lookahead, Make, Plain, Run, fingerprint

# ----------------------------------------------------------------------------------------------------------------------
# Optimizers from outside torch


class Flat(Plain):
    """Moves the one tensor of which its parameters are views."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr)
        self.parameters = [p for group in self.param_groups for p in group["params"]]
        self.flat = torch.cat([p.detach().reshape(-1) for p in self.parameters])
        for p, part in zip(self.parameters, self.flat.split([p.numel() for p in self.parameters]), strict=True):
            p.data = part.view(p.shape)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        self.flat.sub_(torch.cat([g.reshape(-1) for g in gradients]), alpha=self.param_groups[0]["lr"])


class Differentiating(Plain):
    """Adds the gradient of a penalty, for which it needs autograd."""

    def step(self, closure: Any = None) -> None:
        for p in self.trained():
            (penalty,) = torch.autograd.grad((p**4).sum(), p)
            p.data.sub_(penalty + p.grad, alpha=self.param_groups[0]["lr"])


OUTSIDE: dict[str, Make] = {
    "plain": Plain,
    "hoarder": Hoarder,
    "flat": Flat,
    "differentiating": Differentiating,
    "lookahead": lambda p: Lookahead(Hoarder(p)),
    "lookahead over adam": lambda p: Lookahead(Adam(p, lr=0.1)),
}

# ----------------------------------------------------------------------------------------------------------------------
# Every optimizer of torch that steps on dense gradients, in every implementation that the CPU has

NOT_DENSE = {"LBFGS", "SparseAdam"}
CLASSES = [c for c in vars(torch.optim).values() if inspect.isclass(c) and c is not Optimizer]
OPTIONS: dict[str, dict[str, Any]] = {
    "": {},
    "single": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "decay": {"weight_decay": 0.3},
    "decay, fused": {"weight_decay": 0.3, "fused": True},
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True, "foreach": True},
    "momentum, centered": {"momentum": 0.9, "centered": True},
    "amsgrad, foreach": {"amsgrad": True, "foreach": True},
    "maximize": {"maximize": True},
    "maximize, foreach": {"maximize": True, "foreach": True},
    "rate as a tensor": {"lr": torch.tensor(0.2), "foreach": False},
}


def _make(cls: Any, options: dict[str, Any]) -> Make:
    # Options that hold tensors are for one run: an optimizer keeps the tensor.
    return lambda p: cls(p, **({"lr": 0.1} | copy.deepcopy(options)))


TORCHS = {
    f"{cls.__name__} {title}".strip(): _make(cls, options)
    for cls in CLASSES
    if cls.__name__ not in NOT_DENSE
    for title, options in OPTIONS.items()
    if set(options) <= set(inspect.signature(cls).parameters)
    and not (title == "rate as a tensor" and cls.__name__ == "Muon")
}
OPTIMIZERS = TORCHS | OUTSIDE


def test_all_classes_of_torch_are_among_them() -> None:
    assert {type(make([nn.Parameter(torch.ones(2, 2))])) for make in TORCHS.values()} == {
        c for c in CLASSES if c.__name__ not in NOT_DENSE
    }


class Looking(SGD):
    """A step of torch's; ``found`` is called in it."""

    def found(self) -> None: ...

    def _init_group(self, *args: Any) -> Any:
        self.found()
        return super()._init_group(*args)


class LookingPlain(Plain):
    def found(self) -> None: ...

    def step(self, closure: Any = None) -> None:
        self.found()
        super().step(closure)


@pytest.fixture
def trainer() -> pl.Trainer:
    return make_trainer()


@pytest.mark.parametrize("count", [0, 1, 5])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.thinned(5)
def test_it_is_the_step_that_would_be_made(trainer: pl.Trainer, name: str, count: int) -> None:
    made = {}
    for seed in (1, 2):  # before the run that is asked: these draw from the generators that it draws from
        other = Run(OPTIMIZERS[name], count)
        made[seed] = other.real_update(other.gradient(seed))
    run = Run(OPTIMIZERS[name], count)
    trials = TrialSteps(trainer, run.optimizer, run.parameters)
    before = fingerprint(run)
    for seed in (1, 2, 1):  # the third must know nothing of the others
        gradient = run.gradient(seed)
        given = gradient.clone()
        update = trials.update_for(gradient)
        assert torch.equal(update, made[seed])
        assert update.any()
        assert torch.equal(gradient, given)
        assert fingerprint(run) == before
    # And the run goes on as if nothing had been asked.
    assert torch.equal(run.real_update(run.gradient(2)), made[2])
    assert [p.tolist() for p in run.all] == [p.tolist() for p in other.all]


def test_half_precision_parameters_take_a_float32_gradient(trainer: pl.Trainer) -> None:
    run, other = (Run(lambda p: AdamW(p, lr=0.1, weight_decay=0.3), 2, torch.bfloat16) for _ in range(2))
    gradient = run.gradient(1)
    update = TrialSteps(trainer, run.optimizer, run.parameters).update_for(gradient)
    assert update.dtype == torch.float32
    assert torch.equal(update, other.real_update(gradient))
    assert update.any()


def test_what_it_knows_of_the_run_is_left_alone(trainer: pl.Trainer) -> None:
    run, other = Run(Plain, 1), Run(Plain, 1)
    trainer.lock = threading.Lock()  # type: ignore[attr-defined]
    run.optimizer.trainer = trainer
    update = TrialSteps(trainer, run.optimizer, run.parameters).update_for(run.gradient(1))
    assert torch.equal(update, other.real_update(run.gradient(1)))


def tensors_alive() -> dict[int, Tensor]:
    return {id(one): one for one in gc.get_objects() if issubclass(type(one), Tensor)}


def test_what_it_saves_is_gone_when_it_returns(trainer: pl.Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    run, gradients = Run(LookingPlain, 1), []
    trials = TrialSteps(trainer, run.optimizer, run.parameters)

    def note(optimizer: Any) -> None:
        gradients.extend(weakref.ref(p.grad) for p in optimizer.trained())

    def gone_before_the_update_takes_memory(space: VectorSpace, tensors: Any) -> Tensor:
        assert [gradient() for gradient in gradients] == [None] * 3
        return pack(space, tensors)

    pack = VectorSpace.pack
    monkeypatch.setattr(LookingPlain, "found", note)
    monkeypatch.setattr(VectorSpace, "pack", gone_before_the_update_takes_memory)
    gradient = run.gradient(1)
    gc.collect()
    gc.disable()
    try:
        before = tensors_alive()
        update = trials.update_for(gradient)
        assert [one for key, one in tensors_alive().items() if key not in before and one is not update] == []
    finally:
        gc.enable()


def test_kept_graphs_stay_good(trainer: pl.Trainer) -> None:
    run = Run(OPTIMIZERS["AdamW foreach"], 1)
    value = sum((p**3).sum() for p in run.parameters)
    (first,) = torch.autograd.grad(value, run.parameters[:1], create_graph=True)
    TrialSteps(trainer, run.optimizer, run.parameters).update_for(run.gradient(1))
    (second,) = torch.autograd.grad(first.sum(), run.parameters[:1])
    assert torch.equal(second, 6 * run.parameters[0])


def test_kept_graphs_of_operators_are_not_built_again(trainer: pl.Trainer) -> None:
    run, built = Run(OPTIMIZERS["AdamW foreach"], 1), []
    graphs: Graphs[Tensor] = Graphs(1, True, run.parameters)

    def build(index: int) -> Tensor:
        built.append(index)
        return sum((p**3).sum() for p in run.parameters)  # type: ignore[return-value]

    first = graphs.get(0, build)
    TrialSteps(trainer, run.optimizer, run.parameters).update_for(run.gradient(1))
    assert graphs.get(0, build) is first
    assert built == [0]


# ----------------------------------------------------------------------------------------------------------------------
# Hooks, schedulers, parameters of which no copy is made


@pytest.mark.parametrize("name", ["Adam", "plain", "hoarder", "lookahead over adam"])
def test_nobody_hears_of_it(trainer: pl.Trainer, name: str) -> None:
    run, heard = Run(OPTIMIZERS[name], 0), []

    def listen(*args: Any) -> None:
        heard.append(args)

    for optimizer in (run.optimizer, getattr(run.optimizer, "inner", run.optimizer)):
        scheduler = StepLR(optimizer, 1)
        if optimizer is not run.optimizer or name != "lookahead over adam":
            optimizer.register_step_pre_hook(listen)
            optimizer.register_step_post_hook(listen)
    handles = [register_optimizer_step_pre_hook(listen), register_optimizer_step_post_hook(listen)]
    try:
        before, steps = fingerprint(run), scheduler._step_count
        update = TrialSteps(trainer, run.optimizer, run.parameters).update_for(run.gradient(1))
        assert update.any()
        assert heard == []
        assert fingerprint(run) == before
        assert scheduler._step_count == steps
        run.real_update(run.gradient(1))
        assert heard  # they are still there
    finally:
        for handle in handles:
            handle.remove()


def test_a_step_put_on_the_instance_is_not_called(trainer: pl.Trainer) -> None:
    run, calls, real = Run(OPTIMIZERS["Adam"], 1), [], None
    real = run.optimizer.step

    def counting(*args: Any) -> Any:
        calls.append(args)
        return real(*args)

    run.optimizer.step = counting
    expected = Run(OPTIMIZERS["Adam"], 1).real_update(run.gradient(1))
    assert torch.equal(TrialSteps(trainer, run.optimizer, run.parameters).update_for(run.gradient(1)), expected)
    assert calls == []


@pytest.mark.parametrize("cls", [Looking, LookingPlain])
def test_a_frozen_backbone_is_not_copied_for_the_steps_of_torch(
    trainer: pl.Trainer, cls: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, found, kinds = Run(lambda p: cls(p, lr=0.1), 0), out_of_reach([]), out_of_reach([])
    frozen, alone = run.all[2:4]
    frozen.data, alone.data = torch.ones(50, 20), torch.ones(70, 20)

    def note(optimizer: Any) -> None:
        held = [p for group in optimizer.param_groups for p in group["params"]]
        kinds().extend((type(p), p.requires_grad) for p in held)
        found().extend(one.nbytes for key, one in tensors_alive().items() if key not in before)

    monkeypatch.setattr(cls, "found", note)
    trials, gradient = TrialSteps(trainer, run.optimizer, run.parameters), run.gradient(1)
    before = tensors_alive()
    trials.update_for(gradient)
    sizes = found()
    assert {p.nbytes for p in run.parameters} <= set(sizes)
    still = {frozen.nbytes, alone.nbytes}
    assert set(sizes) & still == (set() if cls is Looking else still)
    # torch chooses its implementation by the type.
    assert kinds()[:5] == [(nn.Parameter, p.requires_grad) for p in run.all]
