"""Every row that a monitor logs, compared with the dense oracle of the step it belongs to."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lightning_curvature import DirectionalCurvatureMonitor
from tests.helpers.runs import Outcome, Step, own
from tests.oracles.dense import Reference, loss_along

ALL = ("hvp", "gauss_newton", "kl", "finite_difference")

# Exact estimators in float64: some hundred roundings of 1e-16, and sums that cancel to a hundredth at worst, give
# 1e-12; the rest is room for a step whose gᵀd or dᵀHd happens to be small.
EXACT = 1e-9
# Finite differences at the best ε: rounding u·L/(ε²dᵀHd) against truncation ε² meet near 1e-7; room for a small dᵀHd.
DIFFERENCE = 1e-5


def monitors(**options: Any) -> list[DirectionalCurvatureMonitor]:
    """One monitor with all estimators, and the default pair, whose gᵀd is that of the kept gradient."""
    return [
        DirectionalCurvatureMonitor(estimators=ALL, every_n_train_steps=1, on_error="raise", **options),
        DirectionalCurvatureMonitor(every_n_train_steps=1, prefix="pair", on_error="raise", **options),
    ]


def rows_of(outcome: Outcome, prefix: str = "curvature") -> list[dict[str, float]]:
    """Rows of the measured steps in their order, keys without the prefix."""
    found = [row for _, row in sorted(outcome.capture.rows.items()) if f"{prefix}/two_over_lr" in row]
    return [own(row, prefix) for row in found]


def norm_of(step: Step) -> float:
    """‖d‖."""
    return math.sqrt(sum(float((b - step.after[name]).square().sum()) for name, b in step.before.items()))


def check_row(row: dict[str, float], truth: Reference, step: Step) -> None:
    """Compare whatever of the keys the row has."""
    close = pytest.approx
    assert row["two_over_lr"] == 2.0 / step.lr
    assert row["update_norm"] == close(norm_of(step) / step.lr, rel=EXACT)
    assert row["descent"] == close(truth.descent / step.lr, rel=EXACT)
    curvatures = {
        "lambda_dir": (truth.hessian, EXACT),
        "lambda_gn": (truth.gauss_newton, EXACT),
        "lambda_fd": (truth.hessian, DIFFERENCE),
        "lambda_kl": (truth.gauss_newton, DIFFERENCE),
    }
    present = {key: entry for key, entry in curvatures.items() if key in row}
    assert present
    if truth.descent <= 0.0:
        assert all(math.isnan(row[key]) for key in present), row
        assert math.isnan(row["headroom"])
        return
    for key, (quadratic, tolerance) in present.items():
        assert row[key] == close(quadratic / truth.descent / step.lr, rel=tolerance), key
    expected = 2.0 * truth.descent / truth.hessian if truth.hessian > 0.0 else math.inf
    assert row["headroom"] == close(expected, rel=EXACT if "lambda_dir" in row else DIFFERENCE)


def check(outcome: Outcome, steps: int, uphill: int = 0) -> list[Reference]:
    """Compare all rows of :func:`monitors` with the oracle; ``uphill`` steps, and no more, may have gᵀd ≤ 0."""
    rows, pairs = rows_of(outcome), rows_of(outcome, "pair")
    assert len(outcome.steps) == len(rows) == len(pairs) == steps
    truths = [outcome.reference(index) for index in range(steps)]
    for truth, row, pair, step in zip(truths, rows, pairs, outcome.steps, strict=True):
        check_row(row, truth, step)
        check_row(pair, truth, step)
    assert sum(truth.descent <= 0.0 for truth in truths) == uphill
    return truths


def first_crossing(outcome: Outcome, index: int, furthest: float) -> float:
    """Smallest c, in steps and below ``furthest``, with L(θ_t − c·d) > L(θ_t); by a scan, then bisection."""
    module, step = outcome.module, outcome.steps[index]

    def loss_at(factor: float) -> float:
        return loss_along(module.network, module.loss, step.parts, step.before, step.after, factor)

    base, count = loss_at(0.0), 400
    low = 0.0
    for i in range(1, count + 1):
        high = furthest * i / count
        if loss_at(high) > base:
            break
        low = high
    else:
        raise AssertionError(f"no crossing below {furthest} steps")
    for _ in range(30):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if loss_at(middle) > base else (middle, high)
    return torch.tensor([low, high]).mean().item()
