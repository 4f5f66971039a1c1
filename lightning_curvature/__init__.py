"""Loss curvature along the steps an optimizer really takes, as Lightning callbacks and torchmetrics metrics."""

from lightning_curvature.callbacks import BatchSharpnessMonitor, DirectionalCurvatureMonitor, HessianSpectrumMonitor
from lightning_curvature.reporting import CurvatureWarning
from lightning_curvature.update import ParameterUpdate

__all__ = [
    "BatchSharpnessMonitor",
    "CurvatureWarning",
    "DirectionalCurvatureMonitor",
    "HessianSpectrumMonitor",
    "ParameterUpdate",
]
