"""Metrics of the spectrum of the Hessian, by the dense matrix of all batches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_curvature.linalg import VectorSpace, spectral_density
from lightning_curvature.metrics import HessianDensity, HessianEigenvalues, HessianTrace
from tests.testers.metric_case import MetricCase, Mistake
from tests.testers.metric_cases.sharpness import SMALL, derivatives
from tests.testers.metric_cases.sharpness import small_network as network

# Eigenvalues and traces: relative residuals of 1e-9 at most, and products of some hundred roundings.
REL = 2e-9
# Three steps of a chain and a sum of bells, whose height changes with their width, a share of the nodes' range.
DENSITY_REL = 1e-8

# Fewer than the different eigenvalues: the chain has no end that rounding could move.
STEPS = 3


def matrix(updates: Sequence[Any]) -> Tensor:
    """The Hessian of the mean over samples; the Krylov basis of the trace is complete in its eight dimensions."""
    parts = [(len(y), derivatives(x, y)[1]) for x, y in updates]
    return sum(n * h for n, h in parts) / sum(n for n, _ in parts)


def eigenvalue(updates: Sequence[Any]) -> float:
    return float(torch.linalg.eigvalsh(matrix(updates))[-1])


def trace(updates: Sequence[Any]) -> float:
    return float(matrix(updates).trace())


def density(updates: Sequence[Any]) -> Tensor:
    hessian, space = matrix(updates), VectorSpace([p.detach() for p in network().parameters()])
    found = spectral_density(lambda v: hessian @ v, space, starts=2, steps=STEPS)
    grid = found.grid()
    return torch.stack([grid, found.evaluate(grid)])


def fisher(kind: Callable[..., Any]) -> Mistake:
    return Mistake(
        lambda: kind(network(), F.cross_entropy, curvature="fisher"),
        r"curvature must be 'hessian' or 'gauss_newton', got 'fisher': ",
    )


def late(kind: Callable[..., Any], name: str, value: Any) -> Mistake:
    """A number outside its rule."""
    return Mistake(
        lambda: kind(network(), F.cross_entropy, **{name: value}),
        rf"{name} must ",
    )


ABSENT = {
    "more_numbers_on_ranks": "compute is all that it gives",
    "inputs_keep_no_graph": "inputs of a model are data",
    "forward_gives_no_graph": "inputs of a model are data",
    "update_that_fails_loses_nothing": "update keeps the batch and evaluates nothing",
    "update_that_stops_halfway_adds_nothing": "update keeps the batch and evaluates nothing",
    "forward_that_fails_loses_nothing": "forward keeps its batch before it evaluates: test_spectrum_habits.py",
}


def case(kind: Any, options: dict[str, Any], reference: Any, *, mistakes: list[Mistake], **others: Any) -> MetricCase:
    return MetricCase(
        kind=kind,
        make=functools.partial(kind, **options),
        updates=SMALL,
        reference=reference,
        network=network,
        mistakes=[fisher(kind), *mistakes],
        **({"rel": REL, "absent": ABSENT} | others),
    )


CASES = [
    case(
        HessianEigenvalues,
        {"tolerance": 1e-9},
        eigenvalue,
        name="eigenvalues",
        mistakes=[late(HessianEigenvalues, "k", 0), late(HessianEigenvalues, "tolerance", -1.0)],
    ),
    case(HessianTrace, {}, trace, name="trace", mistakes=[late(HessianTrace, "relative_error", 0.0)]),
    case(
        HessianDensity,
        {"starts": 2, "steps": STEPS},
        density,
        name="density",
        rel=DENSITY_REL,
        # Places are not drawn, but where values stand.
        drawn=lambda value: value[1].tolist(),
        mistakes=[late(HessianDensity, "starts", 0), late(HessianDensity, "steps", 0)],
        absent=ABSENT | {"plot_of_several_values": "a density is drawn as a curve, one at a time"},
    ),
]
