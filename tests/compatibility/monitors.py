"""The monitors: one half of every matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
from torch.utils.data import DataLoader, TensorDataset

from lightning_curvature import (
    BatchSharpnessMonitor,
    DirectionalCurvatureMonitor,
    HessianSpectrumMonitor,
    NoiseCovarianceMonitor,
    StabilizationMonitor,
)
from lightning_curvature.batch_sharpness.options import QUANTITIES
from lightning_curvature.monitors.base import Monitor
from lightning_curvature.reporting.names import full_name
from tests.helpers.runs import classification
from tests.helpers.witness import ALL, LAMBDAS

# The others are made of the same products, or of many more.
SPECTRUM = ("lambda_max", "gauss_newton_lambda_max", "preconditioned_lambda_max")
SHARPNESS = ("batch_sharpness", "step_sharpness", "ias", "gni", "lambda_gen", "update_sharpness")
NOISE = (
    "noise_gamma",
    "noise_gamma_awd",
    "noise_commutativity",
    "noise_alignment",
    "noise_spearman",
    "noise_coupling",
    "noise_coupling_random",
)
EVERY = 3
FEW = {"num_batches": 4, "min_batches": 4}


@dataclass(frozen=True)
class Kind:
    """A monitor.

    Attributes:
        type: its class.
        options: those of a quick run.
        more: beside them, those of a run that is compared digit by digit, with all kinds of products.
        keys: what it must have a finite value of at every measured step, without the prefix.
        watched: the one of them that a stopper or a checkpoint would watch.
    """

    type: Callable[..., Monitor]
    options: Mapping[str, Any]
    more: Mapping[str, Any]
    keys: tuple[str, ...]
    watched: str

    def make(self, **options: Any) -> Monitor:
        """One that measures every third step, with as few products as may be."""
        defaults = {"every_n_train_steps": EVERY, "on_error": "raise"}
        return self.type(**(defaults | dict(self.options) | options))

    def thorough(self, **options: Any) -> Monitor:
        """One that measures more, and eigenvalues to all digits."""
        return self.make(**(dict(self.more) | options))

    def rows(self, rows: Mapping[int, Mapping[str, float]], prefix: str = "curvature") -> dict[int, dict[str, float]]:
        """What it has logged, by step: a value or its error, without the prefix."""
        keys = {full_name(prefix, key): key for key in (*self.keys, *(f"{key}_error" for key in self.keys))}
        found = {step: {keys[k]: v for k, v in row.items() if k in keys} for step, row in sorted(rows.items())}
        return {step: row for step, row in found.items() if row}

    def check(self, rows: Mapping[int, Mapping[str, float]], steps: tuple[int, ...], prefix: str = "curvature") -> None:
        """Values at these steps and at no other, all of them finite."""
        found = self.rows(rows, prefix)
        assert tuple(found) == steps
        for step, row in found.items():
            assert [key for key in self.keys if not math.isfinite(row[key])] == [], step


MONITORS = {
    "directional": Kind(
        DirectionalCurvatureMonitor,
        {"estimators": ALL},
        {},
        (*LAMBDAS.values(), "descent", "update_norm"),
        "lambda_kl",
    ),
    "spectrum": Kind(
        HessianSpectrumMonitor,
        {"quantities": SPECTRUM, "max_products": 20, "tolerance": 0.1, "micro_batch_size": 22},
        # Whole batches, as most loaders of tests hand them out.
        {
            "quantities": (*SPECTRUM, "lambda_min", "hessian_trace"),
            "max_products": 100,
            "tolerance": 1e-6,
            "trace_error": 0.9,
            "micro_batch_size": None,
        },
        SPECTRUM,
        "lambda_max",
    ),
    "sharpness": Kind(
        BatchSharpnessMonitor,
        {"quantities": SHARPNESS} | FEW,
        {"quantities": QUANTITIES} | FEW,
        SHARPNESS,
        "batch_sharpness",
    ),
    "stabilization": Kind(
        StabilizationMonitor,
        # At the end, too, is its own default.
        {
            "sample_sizes": (2, 3),
            "subspace_dim": 1,
            "candidates": 2,
            "trace_vectors": 3,
            "validation_draws": 1,
            "tolerance": 0.1,
            "at_end": False,
        },
        # Single samples, where loaders of tests hand out whole batches.
        {
            "probe_dataloader": DataLoader(TensorDataset(*classification(1)[0]), batch_size=8),
            "estimators": ("gaussian_moment", "direct"),
            "draws": 4,
            "tolerance": 1e-6,
        },
        ("delta_1", "delta_2", "delta_2_subspace"),
        "delta_1",
    ),
    "noise": Kind(
        NoiseCovarianceMonitor,
        # A layer that nearly all modules of tests have. At the end, too, is its own default.
        {"parameter": "network.0.weight", "at_end": False},
        {"haar_draws": 2},
        NOISE,
        "noise_gamma",
    ),
}

each_monitor = pytest.mark.parametrize("kind", MONITORS.values(), ids=MONITORS)
