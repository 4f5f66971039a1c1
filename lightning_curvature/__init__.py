"""Loss curvature along the steps that an optimizer really takes, as Lightning callbacks and torchmetrics metrics."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_curvature import callbacks as callbacks
    from lightning_curvature import functional as functional
    from lightning_curvature import linalg as linalg
    from lightning_curvature import metrics as metrics
    from lightning_curvature import operators as operators
    from lightning_curvature.callbacks import (
        BatchSharpnessMonitor,
        DirectionalCurvatureMonitor,
        HessianSpectrumMonitor,
        NoiseCovarianceMonitor,
        RegimeMonitor,
        StabilityMonitor,
        StabilizationMonitor,
    )
    from lightning_curvature.monitors.checkpoints import evaluate_checkpoints
    from lightning_curvature.monitors.evaluation import Evaluation
    from lightning_curvature.monitors.trajectory import Trajectory
    from lightning_curvature.noise.result import NoiseCurvature
    from lightning_curvature.optimizers.update import ParameterUpdate
    from lightning_curvature.regimes.result import RegimeChange
    from lightning_curvature.reporting.loggers import CurvatureWarning
    from lightning_curvature.stabilization.result import CriterionRow, SampleGrowth

    __version__: str

_ROOMS = ("callbacks", "functional", "linalg", "metrics", "operators")
_HOMES = {
    "BatchSharpnessMonitor": "batch_sharpness.monitor",
    "CriterionRow": "stabilization.result",
    "CurvatureWarning": "reporting.loggers",
    "DirectionalCurvatureMonitor": "directional.monitor",
    "Evaluation": "monitors.evaluation",
    "HessianSpectrumMonitor": "spectrum.monitor",
    "NoiseCovarianceMonitor": "noise.monitor",
    "NoiseCurvature": "noise.result",
    "ParameterUpdate": "optimizers.update",
    "RegimeChange": "regimes.result",
    "RegimeMonitor": "regimes.monitor",
    "SampleGrowth": "stabilization.result",
    "StabilityMonitor": "stability.monitor",
    "StabilizationMonitor": "stabilization.monitor",
    "Trajectory": "monitors.trajectory",
    "evaluate_checkpoints": "monitors.checkpoints",
}

__all__ = [
    "BatchSharpnessMonitor",
    "CriterionRow",
    "CurvatureWarning",
    "DirectionalCurvatureMonitor",
    "Evaluation",
    "HessianSpectrumMonitor",
    "NoiseCovarianceMonitor",
    "NoiseCurvature",
    "ParameterUpdate",
    "RegimeChange",
    "RegimeMonitor",
    "SampleGrowth",
    "StabilityMonitor",
    "StabilizationMonitor",
    "Trajectory",
    "evaluate_checkpoints",
]


def __getattr__(name: str) -> Any:
    """Import a public name or room when first used: for every Trainer Lightning loads this package, by ``autoload``."""
    value: Any
    if name == "__version__":
        from importlib.metadata import version  # takes longer than all else here

        value = version("lightning-curvature")
    elif name in _ROOMS:
        value = importlib.import_module(f"{__name__}.{name}")
    elif name in _HOMES:
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS, "__version__"})
