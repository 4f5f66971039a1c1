"""Loss curvature along the steps that an optimizer really takes, as Lightning callbacks and torchmetrics metrics."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_curvature.callbacks import (
        BatchSharpnessMonitor,
        DirectionalCurvatureMonitor,
        HessianSpectrumMonitor,
        NoiseCovarianceMonitor,
        RegimeMonitor,
        StabilityMonitor,
        StabilizationMonitor,
    )
    from lightning_curvature.noise.result import NoiseCurvature
    from lightning_curvature.optimizers.update import ParameterUpdate
    from lightning_curvature.regimes.result import RegimeChange
    from lightning_curvature.reporting.loggers import CurvatureWarning
    from lightning_curvature.stabilization.result import CriterionRow, SampleGrowth

_HOMES = {
    "BatchSharpnessMonitor": "batch_sharpness.monitor",
    "CriterionRow": "stabilization.result",
    "CurvatureWarning": "reporting.loggers",
    "DirectionalCurvatureMonitor": "directional.monitor",
    "HessianSpectrumMonitor": "spectrum.monitor",
    "NoiseCovarianceMonitor": "noise.monitor",
    "NoiseCurvature": "noise.result",
    "ParameterUpdate": "optimizers.update",
    "RegimeChange": "regimes.result",
    "RegimeMonitor": "regimes.monitor",
    "SampleGrowth": "stabilization.result",
    "StabilityMonitor": "stability.monitor",
    "StabilizationMonitor": "stabilization.monitor",
}

__all__ = [
    "BatchSharpnessMonitor",
    "CriterionRow",
    "CurvatureWarning",
    "DirectionalCurvatureMonitor",
    "HessianSpectrumMonitor",
    "NoiseCovarianceMonitor",
    "NoiseCurvature",
    "ParameterUpdate",
    "RegimeChange",
    "RegimeMonitor",
    "SampleGrowth",
    "StabilityMonitor",
    "StabilizationMonitor",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: Lightning loads this package, by ``autoload``, for every Trainer."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
