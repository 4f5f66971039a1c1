"""What is measured of mini-batch sharpness at one step, and how well."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import lightning.pytorch as pl
from torch import Tensor

from lightning_curvature.operators import GaussNewtonOperator, HessianOperator, MicroBatch
from lightning_curvature.probe_draws import Population
from lightning_curvature.probe_loss import ProbeLoss
from lightning_curvature.trial_steps import TrialSteps

Quantity = Literal[
    "batch_sharpness", "step_sharpness", "modified_batch_sharpness", "ias", "gni", "lambda_gen", "lambda_max_b"
]
QUANTITIES: tuple[Quantity, ...] = (
    "batch_sharpness",
    "step_sharpness",
    "modified_batch_sharpness",
    "ias",
    "gni",
    "lambda_gen",
    "lambda_max_b",
)

# What each needs beside the gradient of a batch, with its graph.
OWN_PRODUCT = ("batch_sharpness", "modified_batch_sharpness")
CROSS_PRODUCT = ("ias", "gni")
CROSSED = (*CROSS_PRODUCT, "lambda_gen")
# They hold ∇L of the whole probe set.
FULL_GRADIENT = ("gni", "lambda_gen")
# Of the pairs of batches that a rank draws at a time, each gives the curvature for the other's gradient.
PAIR = 2


@dataclass(frozen=True)
class SharpnessProblem:
    """What is measured at one step.

    Attributes:
        trainer: the Trainer.
        loss: makes micro-batches of what was drawn.
        parameters: the parameters that are differentiated.
        lr: η.
        population: of which mini-batches are drawn, or None where only the step's own batch counts.
        step: this rank's micro-batches of the coming step, weighted as its gradient weights them.
        trials: makes the updates of the optimizer, for "lambda_gen".
        key: of the draws: other batches at every step, and the same ones in a resumed run.
        on_product: called after every product.
    """

    trainer: pl.Trainer
    loss: ProbeLoss
    parameters: Sequence[Tensor]
    lr: float
    population: Population | None
    step: Sequence[MicroBatch]
    trials: TrialSteps | None
    key: int
    on_product: Callable[[], None]


@dataclass(frozen=True)
class DrawOptions:
    """How many mini-batches are drawn, and what is measured on them.

    Attributes:
        quantities: names, without "step_sharpness".
        operator: of the curvature.
        num_batches: the most batches, over all ranks.
        min_batches: the fewest that tell something.
        relative_error: relative standard error to reach.
        tolerance: relative residual of "lambda_max_b".
    """

    quantities: tuple[Quantity, ...]
    operator: type[HessianOperator] | type[GaussNewtonOperator]
    num_batches: int
    min_batches: int
    relative_error: float
    tolerance: float
