"""Curvature as operators on the space of the parameters: products with matrices that are never formed."""

from lightning_curvature.operators.base import CurvatureOperator
from lightning_curvature.operators.composed import PreconditionedOperator, SecondMomentOperator
from lightning_curvature.operators.differences import DifferenceHistory, GradientDifferenceOperator
from lightning_curvature.operators.exact import Curvature, GaussNewtonOperator, HessianOperator, operator_type
from lightning_curvature.operators.linear_layer import LinearStatistics, NotSeparableError, linear_statistics
from lightning_curvature.operators.micro_batches import MicroBatch, micro_batches
from lightning_curvature.operators.mini_batch import MiniBatch
from lightning_curvature.operators.sharding import Sharding

__all__ = [
    "Curvature",
    "CurvatureOperator",
    "DifferenceHistory",
    "GaussNewtonOperator",
    "GradientDifferenceOperator",
    "HessianOperator",
    "LinearStatistics",
    "MicroBatch",
    "MiniBatch",
    "NotSeparableError",
    "PreconditionedOperator",
    "SecondMomentOperator",
    "Sharding",
    "linear_statistics",
    "micro_batches",
    "operator_type",
]
