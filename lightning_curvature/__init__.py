"""Loss curvature along the steps an optimizer really takes, as Lightning callbacks and torchmetrics metrics."""

from lightning_curvature.callbacks import DirectionalCurvatureMonitor, HessianSpectrumMonitor
from lightning_curvature.reporting import CurvatureWarning
from lightning_curvature.update import ParameterUpdate

__all__ = ["CurvatureWarning", "DirectionalCurvatureMonitor", "HessianSpectrumMonitor", "ParameterUpdate"]
