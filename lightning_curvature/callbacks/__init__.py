"""When to measure: one Lightning callback for each family of quantities."""

from lightning_curvature.callbacks.batch_sharpness import BatchSharpnessMonitor
from lightning_curvature.callbacks.directional import DirectionalCurvatureMonitor
from lightning_curvature.callbacks.noise import NoiseCovarianceMonitor
from lightning_curvature.callbacks.spectrum import HessianSpectrumMonitor
from lightning_curvature.callbacks.stabilization import StabilizationMonitor

__all__ = [
    "BatchSharpnessMonitor",
    "DirectionalCurvatureMonitor",
    "HessianSpectrumMonitor",
    "NoiseCovarianceMonitor",
    "StabilizationMonitor",
]
