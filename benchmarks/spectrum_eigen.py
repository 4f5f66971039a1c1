"""Computes the largest eigenvalue: cold, from random vectors, and along training, by the monitor."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch
from spectrum_cost import cheapest_product
from spectrum_nets import Net, Reference, Subject
from spectrum_tools import Found, curvlinops, installed, ours, pyhessian, repeated
from timing import Clock, LastRow, Spread, fit

from lightning_curvature import HessianSpectrumMonitor
from lightning_curvature.operators import CurvatureOperator

TOLERANCE = 1e-3
# Relative residual of the reference: λ is off by about its square, over the gap.
_REFERENCE = 1e-6
_TRACKED_REFERENCE = 1e-4

# The goals, as ratios of PyHessian's time to ours: of networks in early training.
COLD_GOAL, WARM_GOAL = 2.3, 4.0


def number(values: Sequence[float], digits: int = 2) -> str:
    """Median, with quartiles where there are several."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}" if values else ""
    spread = Spread.of(values)
    return f"{spread.middle:.{digits}f} [{spread.low:.{digits}f}, {spread.high:.{digits}f}]"


def verdict(label: str, ratio: float, goal: float) -> str:
    """One line of the goals."""
    return f"* {label}: {ratio:.2f} × as fast as PyHessian, {'at least' if ratio >= goal else '**below**'} {goal:g}."


COLD_LEGEND = f"""\
λ_max from a random start, to a relative error of {TOLERANCE:g} (ours), to a residual ‖Hv−λv‖ ≤ {TOLERANCE:g}·λ
(curvlinops with eigsh), or to PyHessian's own rule at its defaults (two consecutive values within 1e-3). *Seconds* from
the network and its data to the value, median [quartiles] over starts; *error* is the largest relative difference from
the reference: float64, plain double backward, residual {_REFERENCE:g}. *Residual*: of the vector that the tool returns
(first start), in float64. *Limit*: the fewest products of any tool that reached that error, at the cost of the cheapest
product (graph kept), without other work.
"""


def cold(net: Net, clock: Clock, repeats: int, patience: float) -> tuple[list[str], list[str]]:
    """Table of the cold search, and lines of the goals."""
    tools: dict[str, Callable[[int], Found]] = {
        "ours": lambda seed: ours(net, clock, TOLERANCE, "auto", seed),
        "ours, no graph kept": lambda seed: ours(net, clock, TOLERANCE, False, seed),
    }
    if installed("pyhessian"):
        tools["PyHessian"] = lambda seed: pyhessian(net, clock, seed)
    if installed("curvlinops"):
        tools["curvlinops + eigsh"] = lambda seed: curvlinops(net, clock, seed, TOLERANCE)
    seconds_each = cheapest_product(net, clock)  # which warms up, too
    runs = {name: repeated(clock, repeats, patience, run) for name, run in tools.items()}
    reference = Reference(net)
    exact = float(reference.largest([runs["ours"][0].vector], _REFERENCE).values[0])
    own = median(run.seconds for run in runs["ours"])

    def off(run: Found) -> float:
        return abs(run.value / exact - 1.0)

    lines = [
        f"Reference {exact:.8g}. {runs['ours'][0].kept} of {len(net.batches)} graphs fitted into memory.",
        "",
        "| tool | starts | seconds | products | value | error | residual | time / ours |",
        "|---|---|---|---|---|---|---|---|",
    ]
    reached = []
    for name, found in runs.items():
        residual = reference.residual(found[0].vector)
        if max(map(off, found)) <= TOLERANCE:
            reached.append(min(run.products for run in found))
        seconds = [run.seconds for run in found]
        note = " (dominant is negative)" if found[0].value < 0.0 else ""
        lines.append(
            f"| {name} | {len(found)} | {number(seconds)} | {number([run.products for run in found], 0)} | "
            f"{found[0].value:.7g}{note} | {max(map(off, found)):.1e} | {residual:.1e} | {median(seconds) / own:.2f} |"
        )
    least = min(reached, default=0)
    lines.append(f"| limit | | {least * seconds_each:.2f} | {least} | | | | {least * seconds_each / own:.2f} |")
    goals = []
    if "PyHessian" in runs:
        ratio = median(run.seconds for run in runs["PyHessian"]) / own
        errors = max(map(off, runs["ours"])), max(map(off, runs["PyHessian"]))
        smaller = "smaller" if errors[0] < errors[1] else "**not smaller**"
        goals = [
            verdict(f"{net.title}, cold", ratio, COLD_GOAL),
            f"* {net.title}, cold: error {errors[0]:.1e} against {errors[1]:.1e}, {smaller}.",
        ]
    return lines, goals


@dataclass
class Point:
    """One measurement along training: time, products, value and its relative error."""

    value: float
    seconds: float
    products: int
    error: float


class _Tick(pl.Callback):
    """Notes time and products between two monitors, at every step that is measured."""

    def __init__(self, clock: Clock, every: int, made: list[int]) -> None:
        self.clock, self.every, self.made = clock, every, made
        self.at = (0.0, 0)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % self.every == 0:
            self.at = (self.clock.now(), self.made[0])


class _Beside(pl.Callback):
    """After the monitors: the same parameters to the reference and to the peers, cold."""

    def __init__(
        self, subject: Subject, ticks: Sequence[_Tick], names: Sequence[str], logger: LastRow, first: int
    ) -> None:
        self.subject, self.ticks, self.names, self.logger, self.first = subject, ticks, names, logger, first
        self.points: list[dict[str, Point]] = []
        self.values: list[float] = []
        self.title = ""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        clock, every = self.ticks[0].clock, self.ticks[0].every
        if batch_idx % every or batch_idx < self.first:
            return
        net = self.subject.net(pl_module)
        self.title = net.title
        anew = ours(net, clock, TOLERANCE, "auto", batch_idx)
        exact = float(Reference(net).largest([anew.vector], _TRACKED_REFERENCE).values[0])

        def point(seconds: float, products: int, value: float) -> Point:
            return Point(value, seconds, products, abs(value / exact - 1.0))

        found = {}
        for name, before, after in zip(self.names, self.ticks, self.ticks[1:], strict=False):
            seconds, products = after.at[0] - before.at[0], after.at[1] - before.at[1]
            found[f"monitor, {name}"] = point(seconds, products, self.logger.values[f"{name}/lambda_max"])
        found["ours, cold each time"] = point(anew.seconds, anew.products, anew.value)
        if installed("pyhessian"):
            peer = pyhessian(net, clock, batch_idx)
            found["PyHessian"] = point(peer.seconds, peer.products, peer.value)
        self.points.append(found)
        self.values.append(exact)


@contextlib.contextmanager
def _counted(made: list[int]) -> Generator[None, None, None]:
    """Count the products of every operator."""
    plain = CurvatureOperator.__call__

    def counted(self: CurvatureOperator, vector: torch.Tensor) -> torch.Tensor:
        made[0] += 1
        return plain(self, vector)

    CurvatureOperator.__call__ = counted  # type: ignore[method-assign]
    try:
        yield
    finally:
        CurvatureOperator.__call__ = plain  # type: ignore[method-assign]


TRACKING_LEGEND = f"""\
λ_max every {{every}} steps of one training run, {{count}} times from step {{first}} on; each search begins with the
vector of the one before, from step 0 on, whose cold search is not counted. `HessianSpectrumMonitor` at each tolerance
inside the Trainer: all of its time before the step, including the isolation of the run. *Ours, cold each time*
(relative error {TOLERANCE:g}) and PyHessian (its defaults; it has no warm start) run on a copy of the same parameters
at the same steps. *× PyHessian*: median of the ratios at the same step. Errors are relative to float64, residual
{_TRACKED_REFERENCE:g}.
"""


def tracking(
    subject: Subject, clock: Clock, first: int, every: int, count: int, tolerances: Sequence[float]
) -> tuple[list[str], list[str]]:
    """Table of tracking, and lines of the goals."""
    made, logger = [0], LastRow()
    names = [f"tolerance {tolerance:g}" for tolerance in tolerances]
    ticks = [_Tick(clock, every, made) for _ in range(len(names) + 1)]
    callbacks: list[pl.Callback] = [ticks[0]]
    for name, tolerance, tick in zip(names, tolerances, ticks[1:], strict=True):
        monitor = HessianSpectrumMonitor(
            every_n_train_steps=every,
            probe_samples=None,
            probe_dataloader=subject.probe,
            tolerance=tolerance,
            prefix=name,
            on_error="raise",
        )
        callbacks += [monitor, tick]
    beside = _Beside(subject, ticks, names, logger, first)
    with _counted(made):
        fit(subject.workload, clock.device, first + every * (count - 1) + 1, [*callbacks, beside], logger)
    points = beside.points
    path = " → ".join(f"{value:.4g}" for value in beside.values)
    lines = [
        f"λ_max: {path}.",
        "",
        "| way | seconds | products | × PyHessian | error, median | error, largest |",
        "|---|---|---|---|---|---|",
    ]
    goals = []
    for name in points[0]:
        own = [point[name] for point in points]
        ratios = [point["PyHessian"].seconds / point[name].seconds for point in points if "PyHessian" in point]
        negative = sum(p.value < 0.0 for p in own)
        note = f" (dominant negative {negative} times)" if negative else ""
        lines.append(
            f"| {name}{note} | {number([p.seconds for p in own])} | {number([p.products for p in own], 0)} | "
            f"{number(ratios)} | {median(p.error for p in own):.1e} | {max(p.error for p in own):.1e} |"
        )
        if name.startswith("monitor") and ratios:
            goals.append(verdict(f"{beside.title}, along training, {name}", median(ratios), WARM_GOAL))
    return lines, goals
