"""torchmetrics classes, one for each quantity, for any PyTorch loop: see docs/plain_pytorch.md.

Sources are cited by name: see docs/references.md.
"""

from lightning_curvature.metrics.directional import (
    CriticalSharpness,
    DirectionalCurvature,
    FiniteDifferenceCurvature,
    GaussNewtonCurvature,
    KLCurvature,
)
from lightning_curvature.metrics.interaction import GradientNoiseInteraction, InteractionAwareSharpness
from lightning_curvature.metrics.noise import NoiseCovariance, NoiseCurvatureRelation
from lightning_curvature.metrics.sharpness import (
    BatchLambdaMax,
    BatchSharpness,
    ModifiedBatchSharpness,
    RatioOfMeans,
    StepSharpness,
)
from lightning_curvature.metrics.spectrum import HessianDensity, HessianEigenvalues, HessianTrace
from lightning_curvature.metrics.stabilization import StabilizationCriterion

__all__ = [
    "BatchLambdaMax",
    "BatchSharpness",
    "CriticalSharpness",
    "DirectionalCurvature",
    "FiniteDifferenceCurvature",
    "GaussNewtonCurvature",
    "GradientNoiseInteraction",
    "HessianDensity",
    "HessianEigenvalues",
    "HessianTrace",
    "InteractionAwareSharpness",
    "KLCurvature",
    "ModifiedBatchSharpness",
    "NoiseCovariance",
    "NoiseCurvatureRelation",
    "RatioOfMeans",
    "StabilizationCriterion",
    "StepSharpness",
]
