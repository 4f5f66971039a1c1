"""Compares a measured step with an unmeasured one, an idle monitor with none, and peers with a forward."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch
from memory import MEASURED, PLAIN, Memory, memory_of_steps
from peers import peers
from references import References, Step
from timing import Clock, Closing, LastRow, Opening, Row, Spread, fit
from workloads import Workload

from lightning_curvature import DirectionalCurvatureMonitor

# Name of a row → estimators, keys of their values.
ESTIMATORS: dict[str, dict[str, str]] = {
    "kl": {"kl": "lambda_kl"},
    "finite_difference": {"finite_difference": "lambda_fd"},
    "kl + finite_difference": {"kl": "lambda_kl", "finite_difference": "lambda_fd"},
    "kl + finite_difference, crossed": {"kl": "lambda_kl", "finite_difference": "lambda_fd"},
    "gauss_newton": {"gauss_newton": "lambda_gn"},
    "hvp": {"hvp": "lambda_dir"},
    "critical": {"critical": "critical_sharpness"},
}

# Steps before the clock counts: the optimizer makes its state, the allocator warms up, ε finds its place.
_WARM_UP = 6
# Steps after the clock, compared with the float64 reference.
_CHECKED = 4


@dataclass
class Cost:
    """What one estimator, or peer, costs and gives.

    Attributes:
        extra: time beyond that of a plain step, in forwards.
        calls: calls of the network beyond those of a plain step.
        errors: key → largest relative difference from the exact value; NaN where a value was NaN, or none was checked.
        stated: key → largest relative error that the monitor itself logged beside the value.
        memory: of a measured step.
    """

    extra: Spread
    calls: float = math.nan
    errors: dict[str, float] = field(default_factory=dict)
    stated: dict[str, float] = field(default_factory=dict)
    memory: Memory | None = None


def _relative(measured: list[Row], plain: list[Row]) -> Spread:
    """Paired difference of neighbouring steps, over the forwards timed right after them."""
    pairs = zip(measured, plain, strict=True)
    return Spread.of([2.0 * (m.step - p.step) / (m.forward + p.forward) for m, p in pairs])


def estimator_cost(
    workload: Workload, clock: Clock, repeats: int, name: str, references: References
) -> tuple[Cost, list[Row]]:
    """Run with every second step measured; returns the cost, and the plain steps in between."""
    estimators = ESTIMATORS[name]
    logger = LastRow()
    errors: dict[str, list[float]] = {key: [] for key in estimators.values()}
    stated: dict[str, list[float]] = {key: [] for key in estimators.values()}

    def check(trainer: pl.Trainer, module: pl.LightningModule, step: Step) -> None:
        reference = references.at(trainer.global_step - 1, step)
        if reference.descent <= 0.0:
            return  # uphill: there is no curvature to compare
        for key, found in errors.items():
            found.append(reference.error(key, logger.values[f"curvature/{key}"]))
            stated[key].append(logger.values[f"curvature_diagnostics/{key}_error"])

    timed_steps = _WARM_UP + 2 * repeats
    opening = Opening(clock, lambda i: i >= timed_steps and i % 2 == 0)
    closing = Closing(opening, check)
    options: dict[str, Any] = {"kinks": "crossed"} if name.endswith("crossed") else {}
    monitor = partial(DirectionalCurvatureMonitor, estimators=tuple(estimators), every_n_train_steps=2, **options)
    fit(workload, clock.device, timed_steps + _CHECKED, [opening, monitor(on_error="raise"), closing], logger)
    rows = closing.rows[_WARM_UP:timed_steps]
    measured, plain = rows[0::2], rows[1::2]
    cost = Cost(
        _relative(measured, plain),
        median(m.calls for m in measured) - median(p.calls for p in plain),
        {key: _largest(found) for key, found in errors.items()},
        {key: _largest(found) for key, found in stated.items()},
        memory_of_steps(workload, clock.device, [monitor()])[MEASURED],
    )
    return cost, plain


def _largest(errors: list[float]) -> float:
    return math.nan if not errors or any(math.isnan(e) for e in errors) else max(errors)


class _Switch(pl.Callback):
    """Takes a callback out of the Trainer for every odd step, and puts it back: with and without it in one run."""

    def __init__(self, callback: pl.Callback) -> None:
        self.callback = callback

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Set the list for the next step. The hooks of this one go on over the old list."""
        others = [c for c in trainer.callbacks if c is not self.callback]
        trainer.callbacks = [others[0], self.callback, *others[1:]] if batch_idx % 2 else others


def idle_cost(workload: Workload, clock: Clock, repeats: int) -> tuple[Spread, Spread]:
    """A step with a monitor that does not measure it beside one without it: ratio, and difference in seconds."""
    opening = Opening(clock, lambda i: False)
    closing = Closing(opening)
    # Step 0, in the warm-up, is the only one it measures.
    monitor = DirectionalCurvatureMonitor(every_n_train_steps=10**9)
    switch = _Switch(monitor)
    fit(workload, clock.device, _WARM_UP + 2 * repeats, [opening, monitor, switch, closing])
    rows = closing.rows[_WARM_UP:]
    pairs = list(zip(rows[0::2], rows[1::2], strict=True))
    without = median(b.step for _, b in pairs)
    difference = Spread.of([a.step - b.step for a, b in pairs])
    ratio = difference.scaled(1.0 / without)
    return Spread(1.0 + ratio.middle, 1.0 + ratio.low, 1.0 + ratio.high, ratio.count), difference


def peer_costs(workload: Workload, clock: Clock, repeats: int, references: References) -> dict[str, Cost | None]:
    """Time the peers after each step of a run without a monitor, given θ_t and d; None for those not installed."""
    functions = peers()
    forwards: list[float] = []
    seconds: dict[str, list[float]] = {name: [] for name, function in functions.items() if function is not None}
    errors: dict[str, list[float]] = {name: [] for name in seconds}
    checked = _WARM_UP + 2 * repeats

    def run(trainer: pl.Trainer, module: pl.LightningModule, step: Step) -> None:
        index = trainer.global_step - 1
        for name in seconds:
            function: Callable[..., float] = functions[name]  # type: ignore[assignment]
            with torch.no_grad():
                start = clock.now()
                value = function(module, step, trainer.precision_plugin.train_step_context)
                took = clock.now() - start
            if index >= checked:
                errors[name].append(references.at(index, step).quadratic_error(value))
            elif index >= _WARM_UP:
                seconds[name].append(took)
        if _WARM_UP <= index < checked:
            forwards.append(closing.rows[-1].forward)

    opening = Opening(clock, lambda i: i % 2 == 0)
    closing = Closing(opening, run)
    fit(workload, clock.device, checked + _CHECKED, [opening, closing])
    return {
        name: Cost(
            Spread.of([s / f for s, f in zip(seconds[name], forwards, strict=True)]),
            errors={"": _largest(errors[name])},
        )
        if name in seconds
        else None
        for name in functions
    }


def plain_memory(workload: Workload, device: torch.device) -> Memory:
    """Memory of a step without a monitor."""
    return memory_of_steps(workload, device, [])[PLAIN]
