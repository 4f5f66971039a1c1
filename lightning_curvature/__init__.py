"""Loss curvature along the steps an optimizer really takes, as Lightning callbacks and torchmetrics metrics."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_curvature.callbacks import (
        BatchSharpnessMonitor,
        DirectionalCurvatureMonitor,
        HessianSpectrumMonitor,
        NoiseCovarianceMonitor,
        StabilizationMonitor,
    )
    from lightning_curvature.optimizers.update import ParameterUpdate
    from lightning_curvature.reporting.loggers import CurvatureWarning

__all__ = [
    "BatchSharpnessMonitor",
    "CurvatureWarning",
    "DirectionalCurvatureMonitor",
    "HessianSpectrumMonitor",
    "NoiseCovarianceMonitor",
    "ParameterUpdate",
    "StabilizationMonitor",
]

_HOMES = {
    "BatchSharpnessMonitor": "batch_sharpness.monitor",
    "CurvatureWarning": "reporting.loggers",
    "DirectionalCurvatureMonitor": "directional.monitor",
    "HessianSpectrumMonitor": "spectrum.monitor",
    "NoiseCovarianceMonitor": "noise.monitor",
    "ParameterUpdate": "optimizers.update",
    "StabilizationMonitor": "stabilization.monitor",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for: Lightning loads ``autoload`` for every Trainer, also of scripts that want nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
