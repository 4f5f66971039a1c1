"""Metrics of mini-batch sharpness, by dense derivatives of each mini-batch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.runs import classification, mlp
from tests.helpers.sharpness_metrics import DATA, METRICS
from tests.oracles.matrices import Matrices
from tests.testers.metric_case import MetricCase, Mistake
from tests.testers.metric_cases.means import errors

Draws = list[tuple[Tensor, Tensor]]

# Products in float64 with some hundred roundings of 1e-16 each, of which parts cancel to a tenth.
REL = 1e-11
# The square of the residual, 1e-6, over a gap of a hundredth at least.
EIGENVALUE_REL = 1e-10
# Sums of squares of differences lose a digit more.
MORE = 10.0

# With this seed the gradients of all pairs have positive products, so that GNI has a value.
BATCHES = [(x[:n], y[:n]) for n, (x, y) in zip((3, 2, 4, 4, 3, 4), classification(6, 4, seed=13), strict=True)]


# Of three features and two classes, for searches of eigenvectors: in eight dimensions they are short.
SMALL = [(x[:, :3], y % 2) for x, y in BATCHES]


def network() -> torch.nn.Sequential:
    return mlp(4, 3, 3)


def small_network() -> torch.nn.Sequential:
    return mlp(3, 2)


@functools.cache
def derivatives(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient and Hessian of the loss of a batch."""
    dense = Matrices(network() if x.shape[1] == 4 else small_network(), F.cross_entropy)
    return dense.gradient([(x, y)]), dense.hessian([(x, y)])


def whole() -> tuple[Tensor, Tensor]:
    """Gradient and Hessian of all samples, which batches of one size make up."""
    parts = [derivatives(*batch) for batch in DATA]
    return sum(g for g, _ in parts) / len(parts), sum(h for _, h in parts) / len(parts)


def mean(values: Any) -> float:
    found = [float(value) for value in values]
    return sum(found) / len(found) if found else math.nan


def pairs(draws: Draws) -> list[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]:
    return list(zip(draws[::2], draws[1::2], strict=False))


def crossed(draws: Draws) -> float:
    """½(gᵀH'g + g'ᵀHg') of pairs."""
    return mean(0.5 * (g @ j @ g + f @ h @ f) for (g, h), (f, j) in pairs(draws))


def squares(draws: Draws) -> float:
    return mean(g @ g for g, _ in draws)


def over_all(draws: Draws) -> float:
    """g_BᵀHg_B with H of all samples."""
    return mean(g @ whole()[1] @ g for g, _ in draws)


FORMULAS: dict[str, Callable[[Draws], float]] = {
    "batch": lambda draws: mean(g @ h @ g / (g @ g) for g, h in draws),
    "modified": lambda draws: mean(g @ h @ g for g, h in draws) / squares(draws),
    "step": lambda draws: mean(g @ h @ g / (g @ g) for g, h in draws[-1:]),
    "lambda_max": lambda draws: mean(torch.linalg.eigvalsh(h)[-1] for _, h in draws),
    "ias": lambda draws: crossed(draws) / squares(draws[: len(draws) // 2 * 2]),
    "ias, data": lambda draws: over_all(draws) / squares(draws),
    "gni": lambda draws: crossed(draws) / mean(g @ f for (g, _), (f, _) in pairs(draws)),
    "gni, data": lambda draws: over_all(draws) / float(whole()[0] @ whole()[0]),
}


def reference(name: str, updates: Sequence[Any]) -> float:
    return FORMULAS[name]([derivatives(x, y) for x, y in updates])


def of_last_pair(name: str, seen: Sequence[Any]) -> float:
    """The value of the last two; NaN where the second of a pair is missing."""
    return math.nan if len(seen) % 2 else reference(name, seen[-2:])


def more(metric: Any) -> dict[str, Any]:
    laws = {"over_batch_sizes": metric.over_batch_sizes([1, 8])} if getattr(metric, "_data", None) else {}
    return errors(metric) | laws


def case(name: str) -> MetricCase:
    kind = METRICS[name]
    paired, step = name in ("ias", "gni"), name == "step"
    small = name == "lambda_max"
    rel = EIGENVALUE_REL if small else REL
    mistakes = [
        Mistake(
            lambda: kind(network(), F.cross_entropy, curvature="fisher"),
            r"curvature must be 'hessian' or 'gauss_newton', got 'fisher': ",
        )
    ]
    if name.endswith("data"):
        mistakes.append(
            Mistake(
                lambda: type(kind(network(), F.cross_entropy))(network(), F.cross_entropy, data=[]),
                r"data must be a non-empty sequence of pairs, or None, got \[\]: give a list of \(inputs, targets\)",
            )
        )
    absent = {
        "inputs_keep_no_graph": "inputs of a model are data",
        "forward_gives_no_graph": "inputs of a model are data",
        "update_that_stops_halfway_adds_nothing": "a draw is added at once, after everything that can fail",
    }
    if step:
        absent["parts_have_other_values"] = "it is that of the last update"
        absent["more_numbers_on_ranks"] = "its standard error is NaN, of one draw: test_sharpness_ranks.py"
    if paired:
        absent["running_window"] = "a window holds single updates, and no pair"
    if name == "gni":
        absent["bootstrap"] = "noise hides the gradient in three resampled pairs"
    return MetricCase(
        name=name,
        kind=type(kind(network(), F.cross_entropy)),
        make=kind,
        updates=SMALL if small else BATCHES,
        reference=lambda seen: reference(name, seen),
        rel=rel,
        network=small_network if small else network,
        alone=(lambda seen: of_last_pair(name, seen)) if paired else None,
        # Step sharpness of several is the mean of what each saw last.
        combined=(lambda shares: mean(reference(name, share) for share in shares)) if step else None,
        more=(lambda metric: {}) if step else more,
        more_rel=MORE * rel,
        mistakes=mistakes,
        absent=absent,
    )


CASES = [case(name) for name in METRICS]
