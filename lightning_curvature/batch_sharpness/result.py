"""The result of one measurement of mini-batch sharpness, and how TensorBoard shows its eigenvalues."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import lightning.pytorch as pl
import torch

from lightning_curvature.monitors.modules import ModuleTable
from lightning_curvature.reporting.loggers import logged_step, tensorboards


@dataclass(frozen=True)
class BatchSharpnessResult:
    """Result of one measurement of mini-batch sharpness.

    Attributes:
        numbers: estimates, quantiles, standard errors and numbers of mini-batches by key; NaN for those that failed.
        modules: terms of batch sharpness by module, where asked for, with standard errors; they add up to it.
        eigenvalues: λ_max of each mini-batch that was drawn for λ_max^b; of a pair the smaller one first.
        reasons: why numbers are NaN, by key.
    """

    numbers: Mapping[str, float]
    modules: ModuleTable | None = None
    eigenvalues: tuple[float, ...] = ()
    reasons: Mapping[str, str] = field(default_factory=dict)

    def values(self) -> dict[str, float]:
        """Return all numbers by key."""
        return dict(self.numbers)


def report_eigenvalues(trainer: pl.Trainer, key: str, eigenvalues: tuple[float, ...]) -> None:
    """Write the eigenvalues of mini-batches to all TensorBoard loggers as a histogram."""
    if trainer.is_global_zero:
        for logger in tensorboards(trainer):
            logger.experiment.add_histogram(key, torch.tensor(eigenvalues, dtype=torch.float64), logged_step(trainer))
