"""Loss curvature along the optimizer's true steps, for PyTorch Lightning."""

from lightning_curvature.callbacks import DirectionalCurvatureMonitor
from lightning_curvature.reporting import CurvatureWarning

__all__ = ["CurvatureWarning", "DirectionalCurvatureMonitor"]
