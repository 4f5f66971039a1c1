"""Lightning callbacks: when to measure, one for each family of quantities."""

from lightning_curvature.callbacks.directional import DirectionalCurvatureMonitor

__all__ = ["DirectionalCurvatureMonitor"]
