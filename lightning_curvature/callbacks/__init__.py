"""Lightning callbacks: when to measure, one for each family of quantities."""

from lightning_curvature.callbacks.batch_sharpness import BatchSharpnessMonitor
from lightning_curvature.callbacks.directional import DirectionalCurvatureMonitor
from lightning_curvature.callbacks.spectrum import HessianSpectrumMonitor

__all__ = ["BatchSharpnessMonitor", "DirectionalCurvatureMonitor", "HessianSpectrumMonitor"]
