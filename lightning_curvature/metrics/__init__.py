"""torchmetrics classes, one for each quantity. They need no Trainer: README shows them in a plain PyTorch loop."""

from lightning_curvature.metrics.directional import (
    CriticalSharpness,
    DirectionalCurvature,
    FiniteDifferenceCurvature,
    GaussNewtonCurvature,
    KLCurvature,
)
from lightning_curvature.metrics.spectrum import HessianDensity, HessianEigenvalues, HessianTrace

__all__ = [
    "CriticalSharpness",
    "DirectionalCurvature",
    "FiniteDifferenceCurvature",
    "GaussNewtonCurvature",
    "HessianDensity",
    "HessianEigenvalues",
    "HessianTrace",
    "KLCurvature",
]
