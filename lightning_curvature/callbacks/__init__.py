"""The Lightning callbacks, one for each family of quantities."""

from lightning_curvature.batch_sharpness.monitor import BatchSharpnessMonitor
from lightning_curvature.directional.monitor import DirectionalCurvatureMonitor
from lightning_curvature.noise.monitor import NoiseCovarianceMonitor
from lightning_curvature.regimes.monitor import RegimeMonitor
from lightning_curvature.spectrum.monitor import HessianSpectrumMonitor
from lightning_curvature.stability.monitor import StabilityMonitor
from lightning_curvature.stabilization.monitor import StabilizationMonitor

__all__ = [
    "BatchSharpnessMonitor",
    "DirectionalCurvatureMonitor",
    "HessianSpectrumMonitor",
    "NoiseCovarianceMonitor",
    "RegimeMonitor",
    "StabilityMonitor",
    "StabilizationMonitor",
]
