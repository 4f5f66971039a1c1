"""The noise monitor with everything it measures, quickly."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader

from lightning_curvature import NoiseCovarianceMonitor
from lightning_curvature.noise.options import QUANTITIES
from tests.helpers.noise import samples as dataset

KEYS = ("noise_gamma", "noise_commutativity", "noise_alignment", "noise_spearman", "noise_coupling")


def samples() -> DataLoader[Any]:
    return DataLoader(dataset(16), batch_size=8, shuffle=True)


def monitor(name: str = "network.0.weight", **options: Any) -> NoiseCovarianceMonitor:
    """All quantities, few rotations."""
    quick: dict[str, Any] = {"quantities": QUANTITIES, "haar_draws": 2, "every_n_train_steps": 4}
    return NoiseCovarianceMonitor(parameter=name, **(quick | options))
