"""Training steps with habits: each changes something that a repetition would change again."""

from __future__ import annotations

import array
import copy
import random
import types
from collections import OrderedDict, UserDict, UserList, deque
from collections.abc import Callable
from typing import Any, ClassVar

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
import torchmetrics
from torch import Tensor, nn


class Averages:
    """A plain object with state, as a module may hold one."""

    def __init__(self, network: nn.Module) -> None:
        self.shadow = [p.detach().clone() for p in network.parameters()]
        self.history: deque[float] = deque(maxlen=5)
        self.count = 0

    def update(self, network: nn.Module, loss: Tensor) -> None:
        self.count += 1
        self.history.append(float(loss))
        for average, p in zip(self.shadow, network.parameters(), strict=True):
            average.mul_(0.9).add_(p.detach(), alpha=0.1)


class Habitual(pl.LightningModule):
    """A small classifier with dropout, a teacher, and one habit in its step."""

    def __init__(self, habit: Callable[[Any, Tensor, Tensor], Tensor | None]) -> None:
        super().__init__()
        self.habit = habit
        self.network = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3)).double()
        self.teacher = copy.deepcopy(self.network).requires_grad_(False)
        self.table = nn.Embedding(6, 3, max_norm=0.5).double()
        self.register_buffer("ema", torch.zeros(3, dtype=torch.float64))
        self.register_buffer("constant", torch.ones(1, dtype=torch.float64).expand(3))
        self.register_buffer("sparse", torch.eye(3, dtype=torch.float64).to_sparse())
        self.losses: list[Tensor] = []
        self.seen: set[int] = set()
        self.counts = {"steps": 0, "by_batch": {}}
        self.array = np.zeros(3)
        self.generator = torch.Generator().manual_seed(5)
        self.numpy_generator = np.random.default_rng(5)
        self.numpy_state = np.random.RandomState(5)
        self.python_generator = random.Random(5)
        self.averages = Averages(self.network)
        self.bag = types.SimpleNamespace(total=0.0)
        self.pair = (torch.zeros(2), [torch.zeros(2)])

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits = self(x)
        loss = F.cross_entropy(logits, y)
        extra = self.habit(self, x, logits)
        loss = loss if extra is None else loss + extra
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        trained = [*self.network.parameters(), *self.table.parameters()]
        optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)}


# Steps that move trained weights where a measurement has put them, or after their loss: refused, the run unharmed.
MOVING = {
    "normalizes_trained_weights",
    "decays_weights_by_hand",
    "decays_weights_past_autograd",
    "gives_trained_weights_new_memory",
    "looks_up_rows_of_bounded_norm",
}

Habit = Callable[[Any, Tensor, Tensor], "Tensor | None"]


HABITS: dict[str, Habit] = {}


def habit(function: Habit) -> Habit:
    HABITS[function.__name__] = function
    return function


@habit
def draws_from_everywhere(m: Any, x: Tensor, logits: Tensor) -> Tensor:
    numbers = [random.random(), float(np.random.rand()), float(torch.rand(()))]  # noqa: NPY002
    numbers += [m.python_generator.random(), m.numpy_generator.random(), m.numpy_state.rand()]
    numbers += [float(torch.rand((), generator=m.generator))]
    return 0.01 * logits.square().mean() * sum(numbers)


@habit
def appends_and_counts(m: Any, x: Tensor, logits: Tensor) -> None:
    m.losses.append(logits.detach().mean())
    m.seen.add(len(m.losses))
    m.counts["steps"] += 1
    m.counts["by_batch"][m.counts["steps"]] = float(x.sum())
    m.array += 1.0
    m.bag.total += float(logits.sum())
    m.pair[0].add_(1.0)
    m.pair[1][0].add_(1.0)


@habit
def replaces_attributes(m: Any, x: Tensor, logits: Tensor) -> None:
    m.losses = [*m.losses, logits.detach()]
    m.ema = 0.9 * m.ema + 0.1 * logits.detach().mean(0)
    m.array = m.array + 1.0
    m.last = x


@habit
def averages_in_place(m: Any, x: Tensor, logits: Tensor) -> None:
    m.ema.mul_(0.9).add_(logits.detach().mean(0), alpha=0.1)
    m.averages.update(m.network, logits.detach().mean())


@habit
def creates_on_first_use(m: Any, x: Tensor, logits: Tensor) -> Tensor:
    if not hasattr(m, "centre"):
        m.register_buffer("centre", logits.detach().mean(0))
        m.started_with = float(logits.sum())
    m.centre.lerp_(logits.detach().mean(0), 0.5)
    return 0.1 * (logits - m.centre).square().mean()


def _towards(m: Any, write: Callable[[Tensor, Tensor], None], logits: Tensor, x: Tensor) -> Tensor:
    with torch.no_grad():
        for teacher, student in zip(m.teacher.parameters(), m.network.parameters(), strict=True):
            write(teacher, student)
        target = m.teacher(x)
    return F.mse_loss(logits, target)


@habit
def moves_a_teacher(m: Any, x: Tensor, logits: Tensor) -> Tensor:
    return _towards(m, lambda t, s: t.lerp_(s, 0.2), logits, x)


@habit
def moves_a_teacher_past_autograd(m: Any, x: Tensor, logits: Tensor) -> Tensor:
    return _towards(m, lambda t, s: t.data.mul_(0.8).add_(s.data, alpha=0.2), logits, x)


@habit
def gives_a_teacher_new_memory(m: Any, x: Tensor, logits: Tensor) -> Tensor:
    return _towards(m, lambda t, s: setattr(t, "data", 0.8 * t.data + 0.2 * s.data), logits, x)


@habit
def reads_the_trainer(m: Any, x: Tensor, logits: Tensor) -> Tensor:
    weight = 0.01 * (m.global_step + m.current_epoch + m.trainer.global_step)
    rate = m.optimizers().param_groups[0]["lr"]
    m.log("rate", rate)
    return (weight + 0.0 * m.trainer.max_epochs) * logits.square().mean()


@habit
def writes_to_the_logger(m: Any, x: Tensor, logits: Tensor) -> None:
    m.logger.experiment.append(float(logits.sum()))
    m.logger.log_metrics({"own": float(logits.mean())}, step=m.global_step)
    for logger in m.loggers:
        logger.log_metrics({"each": float(logits.std())}, step=m.global_step)
    m.trainer.logger.log_metrics({"through_trainer": 1.0})
    m.log_dict({"a": logits.mean(), "b": logits.std()}, on_step=True, on_epoch=True)
    m.print("not twice")


@habit
def sets_what_the_trainer_shows(m: Any, x: Tensor, logits: Tensor) -> None:
    m.trainer.callback_metrics["mine"] = logits.detach().sum()
    m.trainer.should_stop = False


@habit
def decays_the_rate(m: Any, x: Tensor, logits: Tensor) -> None:
    for group in m.optimizers().param_groups:
        group["lr"] *= 0.97
        group["note"] = float(logits.sum())


@habit
def steps_a_scheduler(m: Any, x: Tensor, logits: Tensor) -> None:
    m.lr_schedulers().step()


@habit
def looks_at_gradients(m: Any, x: Tensor, logits: Tensor) -> None:
    gradients = [p.grad for p in m.network.parameters() if p.grad is not None]
    m.log("old_gradient", sum((g.norm() for g in gradients), torch.zeros(())))
    for gradient in gradients:
        gradient.mul_(0.5)
    m.zero_grad(set_to_none=True)


@habit
def changes_modes_and_flags(m: Any, x: Tensor, logits: Tensor) -> None:
    m.network[2].train(m.counts["steps"] % 2 == 1)
    m.network[0].bias.requires_grad_(m.counts["steps"] % 2 == 0)
    m.teacher.eval()
    m.counts["steps"] += 1


@habit
def replaces_its_own_methods(m: Any, x: Tensor, logits: Tensor) -> None:
    m.forward = m.network.forward
    m.training_step = types.MethodType(type(m).training_step, m)


# ------------------------------------------------------------------ what only a walk over everything reaches


class Slotted:
    """Without a ``__dict__``."""

    __slots__ = ("inner", "total")

    def __init__(self, inner: Any = None) -> None:
        self.inner, self.total = inner, 0.0


class FrozenMapping(OrderedDict):  # type: ignore[type-arg]
    """A config that refuses to be updated, yet may be cleared, and whose count moves past its own methods."""

    def __setitem__(self, key: Any, value: Any) -> None:
        raise TypeError("frozen")

    __delitem__ = pop = update = setdefault = __setitem__  # type: ignore[assignment]


class Store:
    """Everything that a walk of limited depth, or over listed types, has missed."""

    shared: ClassVar[dict[str, float]] = {}

    def __init__(self) -> None:
        self.bytes, self.numbers = bytearray(4), array.array("d", [0.0])
        self.user, self.users = UserDict({"total": 0.0}), UserList([0.0])
        self.config = FrozenMapping()
        OrderedDict.__setitem__(self.config, "total", 0.0)
        self.deep = Slotted([{"a": (Slotted(torch.zeros(2)),)}])
        self.generators = Slotted(Slotted(Slotted([torch.Generator().manual_seed(1), np.random.default_rng(1)])))
        self.metric = Slotted(Slotted([torchmetrics.MeanMetric().double()]))
        self.record = [torch.zeros(1) for _ in range(1200)]
        self.count = self.counting()

    def counting(self) -> Callable[[], int]:
        total = 0

        def count() -> int:
            nonlocal total
            total += 1
            return total

        return count

    def totals(self) -> list[float]:
        """Everything that there is to see."""
        config = list(self.config.values())
        slots = [*self.deep.inner[0]["a"][0].inner.tolist(), self.deep.total]
        return [*self.bytes, *self.numbers, *self.user.values(), *self.users, *config, *slots, *map(float, self.record)]


def _store(m: Any) -> Store:
    if not hasattr(m, "store"):
        m.store = Store()
    return m.store  # type: ignore[no-any-return]


@habit
def writes_to_rare_objects(m: Any, x: Tensor, logits: Tensor) -> Tensor:
    s = _store(m)
    value = float(logits.detach().mean())
    s.bytes[0] = (s.bytes[0] + 1) % 256
    s.bytes.append(1)
    s.numbers[0] += value
    s.numbers.append(value)
    s.user["total"] += value
    s.users.append(value)
    OrderedDict.__setitem__(s.config, "total", s.config["total"] + value)
    s.deep.total += value
    s.deep.inner[0]["a"][0].inner.add_(value)
    drawn = float(torch.rand((), generator=s.generators.inner.inner.inner[0]))
    drawn += s.generators.inner.inner.inner[1].random()
    s.metric.inner.inner[0].update(logits.detach())
    s.record[len(s.users) % 1200].add_(value)
    m.totals = [*s.totals(), float(s.metric.inner.inner[0].compute())]
    return 0.01 * logits.square().mean() * (drawn + s.count() + sum(s.totals()) / 1e3)


@habit
def empties_a_frozen_mapping(m: Any, x: Tensor, logits: Tensor) -> None:
    s = _store(m)
    m.was = dict(s.config)
    OrderedDict.clear(s.config)
    OrderedDict.__setitem__(s.config, "total", len(m.was))


_count = 0
_seen: list[float] = []
_generator = torch.Generator()


@habit
def writes_outside_the_module(m: Any, x: Tensor, logits: Tensor) -> Tensor:
    """Globals, class attributes and attributes of a parameter, all of which weight the loss."""
    global _count
    if not hasattr(m, "begun"):
        _count, m.begun = 0, True
        _seen.clear()
        _generator.manual_seed(3)
        Store.shared.clear()
        Store.total = 0
    _count += 1
    _seen.append(float(logits.detach().mean()))
    Store.shared[str(_count)] = 1.0
    Store.total += 1
    weight = m.network[0].weight
    weight.note = getattr(weight, "note", 0) + 1
    drawn = float(torch.rand((), generator=_generator))
    m.outside = [_count, *_seen, len(Store.shared), Store.total, weight.note]
    return 0.01 * logits.square().mean() * (drawn + _count + len(_seen) + Store.total + weight.note)


# ------------------------------------------------------------------ tensors that somebody else was to write


@habit
def normalizes_trained_weights(m: Any, x: Tensor, logits: Tensor) -> Tensor:
    """After the step's own forward; prototypes are then read as they were left."""
    weight = m.network[0].weight
    with torch.no_grad():
        weight.copy_(F.normalize(weight))
    return (x @ weight.T).square().mean() * 0.1


@habit
def looks_up_rows_of_bounded_norm(m: Any, x: Tensor, logits: Tensor) -> Tensor:
    """``Embedding(max_norm=…)`` writes to its weight in its forward."""
    return (logits + m.table(torch.arange(len(x)) % 6)).square().mean()


@habit
def decays_weights_by_hand(m: Any, x: Tensor, logits: Tensor) -> None:
    with torch.no_grad():
        m.network[0].weight.mul_(0.99)
        m.network[3].bias.clamp_(-0.1, 0.1)


@habit
def decays_weights_past_autograd(m: Any, x: Tensor, logits: Tensor) -> None:
    m.network[0].weight.data.mul_(0.99)


@habit
def gives_trained_weights_new_memory(m: Any, x: Tensor, logits: Tensor) -> None:
    m.network[0].weight.data = 0.99 * m.network[0].weight.data


@habit
def counts_in_frozen_parameters(m: Any, x: Tensor, logits: Tensor) -> Tensor:
    """Of no shape of a trained one; unchanged by the first steps, moved past autograd."""
    if not hasattr(m, "counter"):
        m.counter = nn.Parameter(torch.zeros(5, dtype=torch.float64), requires_grad=False)
        m.late = nn.Parameter(torch.zeros(3, dtype=torch.float64), requires_grad=False)
    m.counter.data += 1.0
    if m.global_step >= 3:
        m.late.data.add_(1.0)
    return 0.01 * logits.square().mean() * (m.counter[0] + m.late[0])


@habit
def grows_buffers(m: Any, x: Tensor, logits: Tensor) -> Tensor:
    if not hasattr(m, "bank"):
        m.register_buffer("bank", torch.zeros(1, 3, dtype=torch.float64))
        m.register_buffer("grown", torch.zeros(1, dtype=torch.float64))
    m.bank.data = torch.cat([m.bank, logits.detach()[:1]])
    m.grown.resize_(len(m.grown) + 1).fill_(float(len(m.bank)))
    return 0.1 * (logits - m.bank.mean(0)).square().mean() + 0.0 * m.grown.sum()


@habit
def looks_into_the_optimizer(m: Any, x: Tensor, logits: Tensor) -> None:
    state = m.optimizers().state
    m.momenta = [float(state[p].get("momentum_buffer", torch.zeros(())).norm()) for p in m.network.parameters()]


@habit
def writes_to_the_optimizer(m: Any, x: Tensor, logits: Tensor) -> None:
    for p in m.network.parameters():
        state = m.trainer.optimizers[0].state[p]
        state["seen"] = state.get("seen", 0) + 1
        if state.get("momentum_buffer") is not None:
            state["momentum_buffer"].mul_(0.9)


@habit
def writes_to_the_optimizer_and_looks_through_lightning(m: Any, x: Tensor, logits: Tensor) -> None:
    """Two objects reach the same state: the optimizer, and Lightning's wrapper of it."""
    writes_to_the_optimizer(m, x, logits)
    looks_into_the_optimizer(m, x, logits)
