"""torchmetrics classes, one for each quantity. They need no Trainer: README shows them in a plain PyTorch loop."""

from lightning_curvature.metrics.directional import (
    CriticalSharpness,
    DirectionalCurvature,
    FiniteDifferenceCurvature,
    GaussNewtonCurvature,
    KLCurvature,
)

__all__ = [
    "CriticalSharpness",
    "DirectionalCurvature",
    "FiniteDifferenceCurvature",
    "GaussNewtonCurvature",
    "KLCurvature",
]
