"""Estimates the trace at equal standard error: ours, PyHessian's Hutchinson, and Hutch++ and XTrace of curvlinops."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import torch
from spectrum_cost import hessian_of
from spectrum_eigen import number
from spectrum_nets import Net
from spectrum_tools import COLUMNS, Counted, PyHessian, installed, our_pairs, repeated
from timing import Clock
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_curvature.linalg import Eigenpairs, TraceEstimate, trace

_MOST_PRODUCTS = 600
# The search for the count of a method whose error is only known from repetitions goes up in steps of this factor.
_STEP, _MOST_TRIED = 1.5, 100

TRACE_LEGEND = f"""\
Products and seconds until the standard error of the trace reaches the target, relative to the trace. *Ours*: until the
error that it states reaches it, graphs kept where they fit, median [quartiles] over seeds; deflation by eigenpairs that
the monitor has anyway, whose products are not counted. *PyHessian*: its `trace()` returns samples and stops by another
rule; their standard deviation gives the number that it takes: (deviation / (target · trace))², times the seconds of
one. *Hutch++, XTrace*: `curvlinops`, {COLUMNS} columns at a time; the smallest count, rising by a factor of {_STEP}
from ours, at which the scatter of the repetitions reaches the target; these alone do not estimate their error.
*Scatter*: standard deviation of the values over the repetitions, relative to the trace (for PyHessian the target).
"""


@dataclass
class Run:
    """One estimate with its time."""

    value: float
    error: float
    products: int
    seconds: float


def _ours(net: Net, clock: Clock, target: float, deflation: Eigenpairs | None, seed: int) -> Run:
    start = clock.now()
    operator = hessian_of(net, "auto")
    found: TraceEstimate = trace(
        operator,
        operator.space,
        relative_error=target,
        max_matvecs=_MOST_PRODUCTS,
        deflation=deflation,
        generator=torch.Generator(net.device).manual_seed(seed),
    )
    operator.close()
    return Run(found.value, found.standard_error, found.matvecs, clock.now() - start)


def _curvlinops(net: Net, clock: Clock, name: str, count: int, seed: int) -> Run:
    from curvlinops import hutchpp_trace, xtrace

    torch.manual_seed(seed)
    start = clock.now()
    operator = Counted(net)
    with torch.no_grad():
        value = float((hutchpp_trace if name == "Hutch++" else xtrace)(operator, count))  # type: ignore[arg-type]
    return Run(value, math.nan, operator.products, clock.now() - start)


def _pyhessian(net: Net, clock: Clock, samples: int) -> tuple[list[float], float]:
    """Samples of ``trace()``, and seconds of one."""
    torch.manual_seed(0)
    start = clock.now()
    with sdpa_kernel(SDPBackend.MATH):
        values = PyHessian(net).tool.trace(maxIter=samples, tol=0.0)
    net.rows.zero_grad()
    return [float(value) for value in values], (clock.now() - start) / len(values)


def _scatter(runs: Sequence[Run], value: float) -> float:
    return stdev(run.value for run in runs) / abs(value) if len(runs) > 1 else math.nan


def _until(target: float, least: int, multiple: int, run: Callable[[int], list[Run]], value: float) -> list[Run]:
    """Runs at the smallest tried count whose scatter is at the target; the last tried where none is."""
    count = least
    while True:
        count = multiple * math.ceil(count / multiple)
        runs = run(count)
        if not _scatter(runs, value) > target or _STEP * count > _MOST_TRIED:
            return runs
        count = math.ceil(_STEP * count)


def traces(
    net: Net,
    clock: Clock,
    targets: Sequence[float],
    deflated: Sequence[int],
    repeats: int,
    samples: int,
    patience: float,
) -> list[str]:
    """Table of the trace at each standard error, with nothing and with so many eigenpairs known."""
    known: dict[str, Eigenpairs | None] = {"ours": None}
    for count in deflated:
        known[f"ours, {count} known {'pairs' if count > 1 else 'pair'}"] = our_pairs(net, count)
    own = {
        (name, target): repeated(
            clock, repeats, patience, lambda seed, t=target, d=pairs: _ours(net, clock, t, d, seed), least=2
        )
        for name, pairs in known.items()
        for target in targets
    }
    # All are unbiased: together, weighted by their certainty, they are the reference.
    pooled = [(run.value, run.error) for runs in own.values() for run in runs]
    drawn: list[float] = []
    if installed("pyhessian"):
        drawn, each = _pyhessian(net, clock, samples)
        pooled.append((fmean(drawn), stdev(drawn) / math.sqrt(len(drawn))))
    weights = [1.0 / max(error, 1e-30) ** 2 for _, error in pooled]
    value = sum(w * v for w, (v, _) in zip(weights, pooled, strict=True)) / sum(weights)
    lines = [
        f"Trace {value:.5g} ± {sum(weights) ** -0.5:.1g}, all unbiased estimates together.",
        "",
        "| method | target | repetitions | products | seconds | scatter | time / ours |",
        "|---|---|---|---|---|---|---|",
    ]
    for target in targets:
        rows = {name: own[name, target] for name in known}
        least = min(run.products for run in rows["ours"])
        if installed("curvlinops"):
            for name, multiple in (("Hutch++", 3), ("XTrace", 2)):
                rows[name] = _until(
                    target,
                    least,
                    multiple,
                    lambda count, name=name: repeated(
                        clock, repeats, patience, lambda seed: _curvlinops(net, clock, name, count, seed), least=2
                    ),
                    value,
                )
        base = fmean(run.seconds for run in rows["ours"])
        for name, runs in rows.items():
            scatter = _scatter(runs, value)
            missed = " (not reached)" if not name.startswith("ours") and scatter > target else ""
            lines.append(
                f"| {name}{missed} | {target:g} | {len(runs)} | {number([run.products for run in runs], 0)} | "
                f"{number([run.seconds for run in runs])} | {scatter:.3f} | "
                f"{fmean(run.seconds for run in runs) / base:.2f} |"
            )
        if drawn:
            needed = math.ceil((stdev(drawn) / (target * value)) ** 2)
            seconds = needed * each
            lines.append(
                f"| PyHessian (from {len(drawn)} samples) | {target:g} | 1 | {needed} | {seconds:.2f} | {target:g} | "
                f"{seconds / base:.2f} |"
            )
    return lines
