"""The result of one measurement of mini-batch sharpness."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from lightning_curvature.monitors.modules import ModuleTable


@dataclass(frozen=True)
class BatchSharpnessResult:
    """Result of one measurement of mini-batch sharpness.

    Attributes:
        numbers: estimates, standard errors and numbers of mini-batches by key; NaN for those that failed.
        modules: terms of batch sharpness by module, where asked for, with standard errors; they add up to it.
        reasons: why numbers are NaN, by key.
    """

    numbers: Mapping[str, float]
    modules: ModuleTable | None = None
    reasons: Mapping[str, str] = field(default_factory=dict)

    def values(self) -> dict[str, float]:
        """Return all numbers by key."""
        return dict(self.numbers)
