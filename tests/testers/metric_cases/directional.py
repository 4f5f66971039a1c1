"""Metrics of the curvature along a step, by the textbook formula of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lightning_curvature import metrics
from tests.testers.metric_case import UPDATES, MetricCase, Mistake

# Values are ratios of sums of a few terms of one size; the textbook KL and second difference lose ten units.
REL = 100 * 2.0**-53

METRICS: dict[str, type[metrics.DirectionalCurvature]] = {
    "plain": metrics.DirectionalCurvature,
    "difference": metrics.FiniteDifferenceCurvature,
    "kl": metrics.KLCurvature,
    "gauss_newton": metrics.GaussNewtonCurvature,
    "critical": metrics.CriticalSharpness,
}


def random_updates(kind: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Random arguments of some updates in float64, of 2, 3, … positions where there are any."""
    g = torch.Generator().manual_seed(seed)
    found = []
    for index in range(count):
        a, b, c, lr, weight = (torch.rand(5, generator=g).double() + 0.5).tolist()
        z, change = (torch.randn(2 + index, 4, generator=g).double() for _ in range(2))
        shared = {"lr": lr, "weight": weight}
        found.append(
            {
                "plain": {"quadratic": a - 1.0, "descent": b, **shared},
                "difference": {"loss_plus": 1 + a + b, "loss": 1.0, "loss_minus": 1.1 - b, "epsilon": c, **shared},
                "kl": {"outputs": z, "shifted_outputs": z + change, "epsilon": c, "descent": b, **shared},
                "gauss_newton": {"outputs": z, "tangent": change, "descent": b, **shared},
                "critical": {"critical_factor": a, **shared},
            }[kind]
        )
    return found


def forms(kind: str, u: dict[str, Any]) -> tuple[float, float]:
    """dᵀHd and gᵀd of one update by the textbook formula."""
    if kind == "plain":
        return u["quadratic"], u["descent"]
    if kind == "difference":
        plus, base, minus, epsilon = u["loss_plus"], u["loss"], u["loss_minus"], u["epsilon"]
        return (plus - 2 * base + minus) / epsilon**2, (plus - minus) / (2 * epsilon)
    if kind == "critical":
        return 2 * u["lr"] ** 2, u["critical_factor"] * u["lr"] ** 2
    log_p = u["outputs"].log_softmax(-1)
    p = log_p.exp()
    if kind == "kl":
        divergence = (p * (log_p - u["shifted_outputs"].log_softmax(-1))).sum(-1).mean()
        return 2 * float(divergence) / u["epsilon"] ** 2, u["descent"]
    form = (p * u["tangent"] ** 2).sum(-1) - (p * u["tangent"]).sum(-1) ** 2
    return float(form.mean()), u["descent"]


def ratio(kind: str, updates: Sequence[Any]) -> float:
    """Σ w dᵀHd/η² over Σ w gᵀd/η."""
    numerator = denominator = 0.0
    for u in updates:
        quadratic, descent = forms(kind, u)
        numerator += u["weight"] * quadratic / u["lr"] ** 2
        denominator += u["weight"] * descent / u["lr"]
    return numerator / denominator


EPSILON = r"epsilon must be positive and finite, got {}: 1\.0 is the length of the step"
LIKELIHOOD = r"likelihood must be 'categorical', .* got 'poisson': name the one that is trained"
Z = torch.zeros(1, 2)
MISTAKES: dict[str, list[Mistake]] = {
    "difference": [
        Mistake(lambda: metrics.FiniteDifferenceCurvature().update(1.0, 1.0, 1.0, epsilon=0), EPSILON.format(0))
    ],
    "kl": [
        Mistake(lambda: metrics.KLCurvature(likelihood="poisson"), LIKELIHOOD),  # type: ignore[arg-type]
        Mistake(lambda: metrics.KLCurvature().update(Z, Z, epsilon=-1.0, descent=1.0), EPSILON.format(r"-1\.0")),
    ],
    "gauss_newton": [
        Mistake(lambda: metrics.GaussNewtonCurvature(likelihood="poisson"), LIKELIHOOD),  # type: ignore[arg-type]
    ],
}
NO_MODEL = {
    "copies_measure_the_trained_model": "there is no model",
    "training_is_left_alone": "there is no model",
    "no_graph_is_kept": "there is no model",
}


def case(kind: str) -> MetricCase:
    updates = random_updates(kind, UPDATES)
    # A word for a number, or a length and shapes that cannot be.
    bad = {"kl": {"epsilon": -1.0}, "gauss_newton": {"tangent": torch.zeros(1, 4)}}
    # Two entries in place of one.
    split = "lr" if kind == "critical" else "descent"
    return MetricCase(
        name=kind,
        kind=METRICS[kind],
        make=METRICS[kind],
        updates=updates,
        reference=lambda seen: ratio(kind, seen),
        rel=REL,
        more=lambda metric: {"headroom": metric.headroom()},
        more_rel=REL,
        failing=[updates[0] | bad.get(kind, {"lr": "none"})],
        halting=updates[0] | {split: torch.ones(2)},
        mistakes=MISTAKES.get(kind, []),
        absent=NO_MODEL,
    )


CASES = [case(kind) for kind in METRICS]
