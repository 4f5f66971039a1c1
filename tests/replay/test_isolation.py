"""What a repeated step changes is put back: into the same objects, bit for bit, also after an error."""

from __future__ import annotations

import contextlib
import random
import types
from collections import deque
from collections.abc import Generator
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torchmetrics
from torch import Tensor, nn

from lightning_curvature.operators.differentiation import patched
from lightning_curvature.replay.isolation import ReplayTrainer, muted, parameters_replaced, untouched
from lightning_curvature.replay.memory import addresses
from lightning_curvature.replay.randomness import RandomState
from lightning_curvature.replay.snapshot import Snapshot
from tests.helpers.counting import out_of_reach
from tests.helpers.runs import Capture, make_trainer
from tests.helpers.witness import frozen, module_state, random_states

CPU = torch.device("cpu")


def draw() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]  # noqa: NPY002


def test_random_state_repeats_the_numbers() -> None:
    state = RandomState(CPU)
    first, second = draw(), draw()
    assert first != second
    for _ in range(2):
        state.restore()
        assert draw() == first
    assert draw() == second


class Full(nn.Module):
    """One of each kind of state."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.register_buffer("buffer", torch.arange(3.0))
        self.register_buffer("expanded", torch.ones(1).expand(4))
        self.register_buffer("empty", torch.zeros(0))
        self.register_buffer("sparse", torch.eye(3).to_sparse())
        self.register_buffer("nothing", None)
        self.metric = torchmetrics.MeanMetric()
        self.plain = [torch.zeros(2)]
        self.kept: dict[str, Any] = {"a": [torch.zeros(2)], "b": (torch.zeros(1), {1, 2})}
        self.queue = deque([1, 2], maxlen=3)
        self.array, self.constant = np.zeros(3), np.broadcast_to(np.zeros(1), 3)
        self.generators = [torch.Generator(), random.Random(1), np.random.default_rng(1), np.random.RandomState(1)]
        self.system = random.SystemRandom()
        self.bag = types.SimpleNamespace(count=0, inner=types.SimpleNamespace(count=0))
        self.flag = False


def disturb(m: Any) -> None:
    m.layer(torch.randn(5, 3))
    m.buffer.add_(1.0)
    m.metric.update(torch.rand(4))
    m.plain[0].add_(1.0)
    m.plain.append(torch.ones(1))
    m.kept["a"][0].mul_(2.0).add_(1.0)
    m.kept["b"][0].add_(1.0)
    m.kept["b"][1].add(3)
    m.kept["c"] = 1
    m.queue.append(3)
    m.array += 1.0
    torch.rand(1, generator=m.generators[0])
    m.generators[1].random()
    m.generators[2].random()
    m.generators[3].rand()
    m.bag.count += 1
    m.bag.inner.count += 1
    m.new, m.flag = 1, True
    m.register_buffer("late", torch.zeros(1))
    m.eval()
    m.layer[0].weight.requires_grad_(False)
    m.buffer = torch.zeros(7)
    del m.array


def test_module_state_comes_back_into_the_same_objects() -> None:
    module = Full()
    held = [module.buffer, module.plain, module.plain[0], module.kept["a"], module.bag.inner, module.array]
    before, state = module_state(module), Snapshot([module], addresses(module.parameters()), whole=False)
    for _ in range(2):
        disturb(module)
        assert module_state(module) != before
        state.restore()
        assert module_state(module) == before
        assert list(module_state(module)) == list(before)
    now = [module.buffer, module.plain, module.plain[0], module.kept["a"], module.bag.inner, module.array]
    assert all(a is b for a, b in zip(held, now, strict=True))


def test_memory_that_is_spared_stays_as_it_is() -> None:
    module = nn.Linear(2, 2)
    module.view = module.weight.view(-1)  # shares the parameter's memory
    module.alias = [module.bias]
    state = Snapshot([module], addresses(module.parameters()), whole=False)
    with torch.no_grad():
        for tensor in (module.weight, module.bias):
            tensor.fill_(5.0)
    module.weight.data = torch.full((2, 2), 6.0)
    state.restore()
    assert [tensor.unique().tolist() for tensor in (module.weight, module.view, module.bias)] == [[6.0], [5.0], [5.0]]


@pytest.mark.parametrize("length", [1, 1000, 3000])
def test_a_record_of_any_length_comes_back(length: int) -> None:
    module = nn.Module()
    module.record = [torch.zeros(1) for _ in range(length)]
    state = Snapshot([module], whole=False)
    module.record[-1].add_(1.0)
    module.record.append(torch.ones(1))
    state.restore()
    assert [float(t) for t in module.record] == [0.0] * length


def test_iterators_and_files_are_named() -> None:
    class Deep:
        def __init__(self) -> None:
            self.inner = [[iter([1])]]

    class Counting:
        """An iterator whose position is an attribute."""

        def __init__(self) -> None:
            self.at = 0

        def __iter__(self) -> Any:
            return self

        def __next__(self) -> int:
            self.at += 1
            return self.at

    module = nn.Module()
    module.stream, module.list, module.own, module.deep = (
        (i for i in [1]),
        [1],
        Counting(),
        types.SimpleNamespace(x=Deep()),
    )
    with open(__file__) as module.file:
        state = Snapshot([module], whole=False)
        next(module.own)
        state.restore()
        assert sorted(state.unrepeatable) == ["file", "inner", "stream"]
    assert module.own.at == 0


def test_untouched_after_an_error() -> None:
    module = Full()
    optimizer = torch.optim.SGD(module.parameters(), lr=torch.tensor(0.1), momentum=0.9)
    module.layer[0].weight.grad = torch.ones(3, 3)
    rate, gradient = optimizer.param_groups[0]["lr"], module.layer[0].weight.grad
    before = [module_state(module), random_states(), frozen(optimizer.state_dict())]
    with pytest.raises(RuntimeError, match="inside"), untouched(module, CPU, optimizers=[optimizer]):
        assert all(p.grad is None for p in module.parameters())
        module.layer[0].weight.grad = torch.zeros(3, 3)
        disturb(module)
        draw()
        optimizer.param_groups[0]["lr"].mul_(0.5)
        optimizer.param_groups[0] |= {"momentum": 0.1, "extra": 1}
        raise RuntimeError("inside")
    assert [module_state(module), random_states(), frozen(optimizer.state_dict())] == before
    assert optimizer.param_groups[0]["lr"] is rate
    assert module.layer[0].weight.grad is gradient


def test_every_part_is_put_back_though_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Snapshot) -> None:
        raise OSError("cannot")

    monkeypatch.setattr(Snapshot, "restore", fail)
    module = nn.Linear(1, 1)
    module.weight.grad = torch.ones(1, 1)
    before = random_states()
    with pytest.raises(OSError, match="cannot"), untouched(module, CPU):
        draw()
    assert random_states() == before
    assert torch.equal(module.weight.grad, torch.ones(1, 1))


def test_hooks_that_watch_for_wandb_are_off() -> None:
    """A stand-in for those of ``wandb.watch``, which are known by their module; others may change outputs."""
    called: list[str] = []
    kept = out_of_reach(called)
    module = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    for name in ("before", "wandb", "after"):
        hook = lambda *args, name=name: kept().append(name)  # noqa: E731
        hook.__module__ = "wandb.integration.torch.wandb_torch" if name == "wandb" else __name__
        module[0].register_forward_hook(hook)
    with pytest.raises(RuntimeError, match="no"), untouched(module, CPU):
        module(torch.ones(2))
        raise RuntimeError("no")
    assert called == ["before", "after"]
    module(torch.ones(2))
    assert called[2:] == ["before", "wandb", "after"]


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_patched_comes_off(error: type[BaseException] | None) -> None:
    target = types.SimpleNamespace(old=1)
    expected = pytest.raises(error) if error is not None else contextlib.nullcontext()
    with expected, patched(target, old=2, new=3):
        assert vars(target) == {"old": 2, "new": 3}
        if error is not None:
            raise error
    assert vars(target) == {"old": 1}


def test_patched_leaves_what_others_put_there() -> None:
    target = types.SimpleNamespace()
    with patched(target, name="ours"):
        target.name = "theirs"
    assert target.name == "theirs"


class Loud(pl.LightningModule):
    """Reaches the outside in every way there is."""

    def __init__(self) -> None:
        super().__init__()
        self.part = pl.LightningModule()

    def shout(self) -> None:
        self.log("a", 1.0)
        self.log_dict({"b": 1.0})
        self.part.log("c", 1.0)
        self.print("aloud")
        self.logger.log_metrics({"d": 1.0})
        self.logger.experiment.add_scalar("e", 1.0)
        self.trainer.logger.log_metrics({"f": 1.0})
        self.trainer.callback_metrics["g"] = 1.0
        self.trainer.save_checkpoint("nowhere.ckpt")
        self.trainer.should_stop = True


def test_muted(capsys: pytest.CaptureFixture[str], tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module, capture = Loud(), Capture()
    trainer = make_trainer(logger=capture)
    module.trainer = trainer
    before = set(vars(module))
    with muted(module, global_step=7):
        assert module.global_step == 7
        assert module.trainer.max_epochs == trainer.max_epochs  # everything else is the Trainer's
        assert type(module.trainer) is ReplayTrainer
        assert isinstance(module.trainer, pl.Trainer)
        module.shout()
    assert module.trainer is trainer
    assert set(vars(module)) == before
    assert capture.rows == {}
    assert trainer.callback_metrics == {}
    assert not trainer.should_stop
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def test_replaced_parameters_are_put_back_wherever_they_stand() -> None:
    """A layer under two names, a weight in two layers; also after an error."""
    module = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "c": nn.Linear(2, 2)})
    module["again"] = module["a"]
    module["b"].weight = module["a"].weight
    before = {name: id(p) for name, p in module.named_parameters(remove_duplicate=False)}
    weight, other = module["a"].weight, torch.full((2, 2), 7.0)
    with contextlib.suppress(KeyError), parameters_replaced(module, {id(weight): other}):
        assert module["a"].weight is module["again"].weight is module["b"].weight is other
        assert module["c"].weight is not other
        raise KeyError
    assert {name: id(p) for name, p in module.named_parameters(remove_duplicate=False)} == before


@contextlib.contextmanager
def counted(module: Any) -> Generator[None, None, None]:
    yield


def test_a_context_manager_that_decorates_a_method_is_no_iterator() -> None:
    """It holds a generator that never runs, since each call makes another: transformers' models have such methods."""

    class Decorated(nn.Module):
        @counted(None)
        def forward(self, x: Tensor) -> Tensor:
            return x

    module = Decorated()
    module.method = counted(module)(lambda x: x)  # type: ignore[assignment]
    assert Snapshot([module]).unrepeatable == []
