"""Every optimizer of torch that steps on dense gradients, and one from elsewhere, under each of the three monitors."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_curvature import BatchSharpnessMonitor, DirectionalCurvatureMonitor, HessianSpectrumMonitor
from lightning_curvature.batch_sharpness.options import OF_UPDATES, QUANTITIES
from tests.helpers.runs import Classifier, Outcome, Step, StepRecorder, classification, mlp
from tests.helpers.witness import ALL, Record, assert_same, copies, watch
from tests.oracles.along_step import check_row, rows_of

STEPS = 3  # of which those that measure every second step measure two
SPECTRUM: tuple[Any, ...] = ("lambda_max", "hessian_trace", "second_moment_contraction")
KNOWN = (torch.optim.SGD, torch.optim.Adam, torch.optim.Adamax, torch.optim.RMSprop, torch.optim.Adagrad)


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023, as packages outside torch write it: the sign of a momentum, and decoupled decay."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.1):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            first, second = group["betas"]
            for p in (p for p in group["params"] if p.grad is not None):
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                p.mul_(1.0 - group["lr"] * group["weight_decay"])
                p.sub_(torch.lerp(p.grad, momentum, first).sign_(), alpha=group["lr"])
                momentum.lerp_(p.grad, 1.0 - second)
        return loss


def of_torch() -> Iterable[type[torch.optim.Optimizer]]:
    """Whatever this version of torch has."""
    # The base steps nowhere, and the sparse one on sparse gradients alone.
    others = (torch.optim.Optimizer, torch.optim.SparseAdam)
    for cls in vars(torch.optim).values():
        if inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer) and cls not in others:
            yield cls


# Steps of a length at which there is something to measure, where the default is far from it.
OPTIONS: dict[str, dict[str, Any]] = {"Adadelta": {"lr": 1.0}, "LBFGS": {"lr": 0.1, "max_iter": 4}}


def makers() -> dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]]:
    """Each class as it is, and with each of its faster implementations."""
    found: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {"Lion": (Lion, {})}
    for cls in of_torch():
        found[cls.__name__] = (cls, {})
        for option in {"foreach", "fused"} & set(inspect.signature(cls).parameters):
            found[f"{cls.__name__}, {option}"] = (cls, {option: True})
    return dict(sorted(found.items()))


OPTIMIZERS = makers()


def learner(name: str) -> Classifier:
    cls, options = OPTIMIZERS[name]

    def make(module: Any) -> torch.optim.Optimizer:
        # Muon takes matrices alone; the rest of the module then stays where it is.
        trained = [p for p in module.parameters() if cls.__name__ != "Muon" or p.ndim == 2]
        return cls(trained, **({"lr": 0.01} | OPTIONS.get(cls.__name__, {}) | options))

    return Classifier(mlp(4, 3, 3), make)


def fit(name: str, *monitors: pl.Callback) -> tuple[Record, list[Step]]:
    recorder = StepRecorder()
    data = classification(STEPS)
    record = watch(lambda: learner(name), lambda: copies(data), *monitors or (None,), lambda: [recorder])
    return record, recorder.steps


# The same run is compared with that under each monitor.
alone = functools.cache(lambda name: fit(name)[0])


def spectrum(*more: Any) -> HessianSpectrumMonitor:
    quantities: Any = (*SPECTRUM, *more)
    # Effects on the run are watched, not digits.
    few: Any = {"max_products": 20, "tolerance": 0.9, "trace_error": 0.9}
    return HessianSpectrumMonitor(quantities=quantities, every_n_train_steps=2, on_error="raise", **few)


def sharpness(*without: str) -> BatchSharpnessMonitor:
    quantities: Any = [name for name in QUANTITIES if name not in without]
    few: Any = {"num_batches": 4, "min_batches": 4, "tolerance": 0.9}
    return BatchSharpnessMonitor(quantities=quantities, every_n_train_steps=2, on_error="raise", **few)


def assert_finite(record: Record, keys: Iterable[str]) -> None:
    for key in keys:
        values = record.curve(key)
        assert len(values) == 2, key
        assert all(math.isfinite(value) for value in values), key


def test_the_list_is_complete() -> None:
    """A class that torch adds is tested by itself; none of those that there have always been got lost."""
    old = {"Adagrad", "Adadelta", "Adam", "AdamW", "Adamax", "ASGD", "LBFGS", "NAdam", "RAdam", "RMSprop", "Rprop"}
    assert old | {"SGD", "Lion", "SGD, foreach", "AdamW, foreach", "AdamW, fused", "SGD, fused"} <= OPTIMIZERS.keys()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.thinned(5)
def test_directional(name: str) -> None:
    """Each value against the dense Hessian along the step that was taken."""
    monitor = DirectionalCurvatureMonitor(estimators=ALL, every_n_train_steps=1, on_error="raise")
    watched, steps = fit(name, monitor)
    assert_same(alone(name), watched)
    outcome = Outcome(watched.trainer, watched.module, watched.logger, steps)
    found = rows_of(outcome)
    assert len(found) == STEPS
    for index, row in enumerate(found):
        check_row(row, outcome.reference(index), steps[index])
    values = watched.curve("critical_sharpness")
    assert [math.isfinite(value) for value in values] == [descent > 0.0 for descent in watched.curve("descent")]
    assert sum(math.isfinite(value) for value in values) >= STEPS - 1


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore:.*:lightning_curvature.CurvatureWarning")
@pytest.mark.thinned(6)
def test_spectrum(name: str) -> None:
    known = issubclass(OPTIMIZERS[name][0], KNOWN)
    watched, _ = fit(name, spectrum(*["preconditioned_lambda_max"] * known))
    assert_same(alone(name), watched)
    assert_finite(watched, SPECTRUM)
    if known:
        # Before the first step of an adaptive optimizer there is no P.
        assert math.isfinite(watched.curve("preconditioned_lambda_max")[-1])


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.thinned(6)
def test_sharpness(name: str) -> None:
    without = () if name != "LBFGS" else OF_UPDATES
    watched, _ = fit(name, sharpness(*without))
    assert_same(alone(name), watched)
    assert_finite(watched, [key for key in QUANTITIES if key not in without])


def test_trial_steps_of_lbfgs_are_refused() -> None:
    with pytest.raises(
        MisconfigurationException, match=r"got LBFGS, whose step needs closure: .* leave 'lambda_gen' and"
    ):
        fit("LBFGS", sharpness())
