"""An evaluation that fails leaves the run as it is; a step that did not move has no curvature."""

from __future__ import annotations

import functools
import math
import signal
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins.precision import DoublePrecision
from torch import Tensor, nn

from lightning_curvature import DirectionalCurvatureMonitor
from lightning_curvature.reporting.loggers import CurvatureWarning
from tests.helpers.counting import out_of_reach
from tests.helpers.runs import Classifier, classification
from tests.helpers.witness import (
    ALL,
    LAMBDAS,
    Record,
    Rows,
    Witness,
    assert_same,
    copies,
    module_state,
    random_states,
    watch,
)


class Boom(RuntimeError):
    pass


class Trap:
    """Goes off at one call, counted from the first batch's own; lives outside the module, which is put back."""

    def __init__(self, at: int, error: type[BaseException] = Boom, batch: int = 0) -> None:
        self.at, self.error, self.batch = at, error, batch
        self.calls = out_of_reach(Counter())

    def tread(self, batch_idx: int) -> None:
        calls = self.calls()
        calls[batch_idx] += 1
        if batch_idx == self.batch and calls[batch_idx] == self.at:
            raise self.error("trapped")


class Trapped(Classifier):
    """Falls into the trap in the middle of a step: in eval mode, flags changed, counters ahead, numbers drawn."""

    def __init__(self, trap: Trap, place: str) -> None:
        network = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3))
        super().__init__(network.double(), lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9))
        self.trap, self.place = (lambda batch_idx: trap.tread(batch_idx)), place
        self.count, self.seen, self.batch_idx = 0, list[float](), 0
        if place == "hook":
            self.network[4].register_forward_hook(lambda module, args, output: self.trap(self.batch_idx))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.count, self.batch_idx = self.count + 1, batch_idx
        self.network[1].eval()
        self.network[0].bias.requires_grad_(False)
        for group in self.optimizers().param_groups:
            group["lr"] *= 0.9
        logits = self(batch[0])
        self.seen.append(float(logits.sum()))
        if self.place == "step":
            self.trap(batch_idx)
        self.network[1].train()
        self.network[0].bias.requires_grad_(True)
        loss = F.cross_entropy(logits, batch[1])
        self.log("train_loss", loss)
        return loss


def run(module: Callable[[], Any], monitor: DirectionalCurvatureMonitor | None) -> Record:
    return watch(module, lambda: copies(classification(3)), monitor)


@functools.cache
def unwatched(place: str) -> Record:
    """A run in which the trap never goes off."""
    return run(lambda: Trapped(Trap(0), place), None)


# (estimators, call at which the trap goes off): the step itself is call 1. The pair is calls 2 and 3; the line search
# starts at 2, or after the pair; forward mode and double backward come after it.
FAILURES = [
    (("kl",), 2),
    (("finite_difference",), 2),
    (("finite_difference",), 3),
    (("critical",), 2),
    (("critical",), 4),
    (("gauss_newton",), 2),
    (("hvp",), 2),
    (("gauss_newton", "hvp"), 3),
    (ALL, 2),
    (ALL, 3),
    (ALL, 4),
]


@pytest.mark.parametrize("place", ["step", "hook"])
@pytest.mark.parametrize(("estimators", "at"), FAILURES)
def test_warns_and_goes_on(estimators: tuple[Any, ...], at: int, place: str) -> None:
    trap = Trap(at)
    monitor = DirectionalCurvatureMonitor(estimators=estimators, every_n_train_steps=1, epsilon=1e-3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        watched = run(lambda: Trapped(trap, place), monitor)
    assert_same(unwatched(place), watched)
    messages = [str(w.message) for w in caught if issubclass(w.category, CurvatureWarning)]
    assert messages == ["DirectionalCurvatureMonitor logs NaN: Boom: trapped"]
    # One exact product that fails leaves the other.
    apart = len(estimators) > 1 and not {"kl", "finite_difference"} & set(estimators)
    assert trap.calls()[0] == at + apart
    for name in estimators[:1] if apart else estimators:
        values = watched.curve(LAMBDAS[name])
        assert math.isnan(values[0])
        assert all(math.isfinite(value) for value in values[1:])


def test_objective_that_always_fails() -> None:
    def objective(module: Any, batch: Any) -> Tensor:
        module.eval()
        module.count += 1
        torch.rand(3)
        raise Boom("no loss today")

    plain = unwatched("step")
    monitor = DirectionalCurvatureMonitor(
        estimators=("finite_difference", "hvp"), every_n_train_steps=1, objective=objective
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        watched = run(lambda: Trapped(Trap(0), "step"), monitor)
    assert_same(plain, watched)
    # Said once, though it happens at every step.
    assert [str(w.message) for w in caught if issubclass(w.category, CurvatureWarning)] == [
        "DirectionalCurvatureMonitor logs NaN: Boom: no loss today",
        "DirectionalCurvatureMonitor must make the measurements that are due, got 0 of 3: Boom: no loss today.",
    ]
    for key in ("lambda_fd", "lambda_dir"):
        assert len(watched.curve(key)) == 3
        assert all(math.isnan(value) for value in watched.curve(key))


@pytest.fixture
def _interrupts() -> Iterator[None]:
    # Lightning ignores further interrupts on its way out.
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


class Keeper(Witness):
    """The eye before the monitor, which also sees what the error left behind."""

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.note("batch end", trainer, pl_module)


@pytest.mark.usefixtures("_interrupts")
@pytest.mark.parametrize("place", ["step", "hook"])
@pytest.mark.parametrize(("estimators", "at"), FAILURES)
@pytest.mark.parametrize(("error", "arrives"), [(Boom, Boom), (KeyboardInterrupt, SystemExit)])
@pytest.mark.thinned(3)
def test_error_gets_through_and_state_stays(
    error: type[BaseException], arrives: type[BaseException], estimators: tuple[Any, ...], at: int, place: str
) -> None:
    trap, before = Trap(at, error, batch=1), Keeper()
    monitor = DirectionalCurvatureMonitor(
        estimators=estimators, every_n_train_steps=1, on_error="raise" if error is Boom else "warn"
    )
    module = Trapped(trap, place)
    with pytest.raises(arrives):
        watch(lambda: module, lambda: copies(classification(3)), monitor, lambda: [before])
    assert trap.calls() == {0: trap.calls()[0], 1: at}
    # As of the moment before the monitor's hook, at θ_{t+1} of the second step, and still so after all was torn down.
    (_, expected), (_, left) = before.trail[-2:]
    assert [moment for moment, _ in before.trail].count("batch end") == 3
    skipped = {"batch", "outputs", "attribute ._current_fx_name"}
    assert {k: v for k, v in left.items() if k not in skipped} == {
        k: v for k, v in expected.items() if k not in skipped
    }
    after = module_state(module) | {"random states": random_states()}
    assert {k: after[k] for k in after if k not in skipped} == {k: expected[k] for k in after if k not in skipped}
    assert not {"training_step", "forward", "log"} & set(vars(module))


class SkipsOneStep(DoublePrecision):
    """Like a gradient scaler that found an overflow: the closure runs, the optimizer does not step."""

    def optimizer_step(self, optimizer: Any, model: Any, closure: Any, **kwargs: Any) -> Any:
        if model.trainer.global_step == 1:
            return self._wrap_closure(model, optimizer, closure)
        return super().optimizer_step(optimizer, model, closure, **kwargs)


def test_skipped_step() -> None:
    def module() -> Trapped:
        return Trapped(Trap(0), "step")

    def skipping(monitor: DirectionalCurvatureMonitor | None) -> Record:
        data = [*classification(3), *classification(2)]
        return watch(module, lambda: copies(data), monitor, precision=None, plugins=[SkipsOneStep()])

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        watched = skipping(DirectionalCurvatureMonitor(estimators=ALL, every_n_train_steps=1))
    assert_same(skipping(None), watched)
    said = [str(w.message) for w in caught if issubclass(w.category, CurvatureWarning)]
    assert len(said) == 1
    assert "did not move the parameters" in said[0]
    norms = watched.curve("update_norm")
    for key in LAMBDAS.values():
        finite = [math.isfinite(value) for value in watched.curve(key)]
        assert finite == [norm != 0.0 for norm in norms], key
    assert norms.count(0.0) == 1


def test_what_cannot_be_put_back_is_not_repeated() -> None:
    """An iterator in the step: the position of another one cannot be saved, so nothing is evaluated."""

    class Iterating(Classifier):
        def __init__(self) -> None:
            super().__init__(nn.Linear(4, 3).double(), lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
            self.numbers = iter(range(100))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * (1.0 + 0.1 * next(self.numbers))

    def iterating(monitor: DirectionalCurvatureMonitor | None) -> tuple[Record, int]:
        record = run(Iterating, monitor)
        return record, next(record.module.numbers)

    monitor = DirectionalCurvatureMonitor(estimators=("kl",), every_n_train_steps=1)
    with pytest.warns(CurvatureWarning, match=r"what cannot be put back, got \['numbers'\]"):
        watched, position = iterating(monitor)
    plain, expected = iterating(None)
    assert position == expected == 3
    torch.testing.assert_close(
        watched.module.network.weight,
        plain.module.network.weight,
        rtol=0.0,
        atol=0.0,  # bit for bit
    )
    assert all(math.isnan(value) for value in watched.curve("lambda_kl"))
    assert isinstance(watched.logger, Rows)
