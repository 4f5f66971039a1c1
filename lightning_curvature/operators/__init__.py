"""Curvature as operators on the space of the parameters: products with a matrix that is never formed."""

from lightning_curvature.operators.composed import PreconditionedOperator, SecondMomentOperator
from lightning_curvature.operators.differences import GradientDifferenceOperator, Sharding
from lightning_curvature.operators.exact import (
    Curvature,
    CurvatureOperator,
    GaussNewtonOperator,
    HessianOperator,
    operator_type,
)
from lightning_curvature.operators.micro_batches import MicroBatch, micro_batches

__all__ = [
    "Curvature",
    "CurvatureOperator",
    "GaussNewtonOperator",
    "GradientDifferenceOperator",
    "HessianOperator",
    "MicroBatch",
    "PreconditionedOperator",
    "SecondMomentOperator",
    "Sharding",
    "micro_batches",
    "operator_type",
]
