"""The result of one directional measurement."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from lightning_curvature.directional.estimates import Estimate
from lightning_curvature.directional.line_search import CriticalStep
from lightning_curvature.directional.options import KEYS, OSCILLATION
from lightning_curvature.directional.oscillation import UNKNOWN, OscillationResult
from lightning_curvature.functional import critical_sharpness, directional_curvature, headroom
from lightning_curvature.monitors.modules import ModuleTable

# The headroom is that of the first estimator here whose error is this small: those of the loss's Hessian come first.
_HEADROOM_ORDER = ("hvp", "finite_difference", "gauss_newton", "kl", "critical")
_HEADROOM_ERROR = 0.3
_UNKNOWN = Estimate(math.nan, math.nan)


@dataclass(frozen=True)
class DirectionalResult:
    """Result of one directional measurement.

    Attributes:
        estimators: the estimators that the measurement has keys for.
        estimates: dᵀHd or dᵀGd by estimator, without those that failed.
        descent: gᵀd, NaN where unknown.
        norm: ‖d‖.
        lr: η of the step.
        epsilon: ε, in steps.
        oscillation: the oscillation of the last steps, where it is wanted.
        terms: terms of gᵀd and dᵀHd by module, where they are wanted, as "descent" and "quadratic".
        reasons: why values are NaN, by key.
    """

    estimators: Sequence[str]
    estimates: Mapping[str, Estimate] = field(default_factory=dict)
    critical: CriticalStep | None = None
    descent: float = math.nan
    norm: float = math.nan
    lr: float = math.nan
    epsilon: float = math.nan
    oscillation: OscillationResult = UNKNOWN
    terms: ModuleTable | None = None
    reasons: Mapping[str, str] = field(default_factory=dict)

    def with_reason(self, estimators: Sequence[str], reason: str) -> "DirectionalResult":
        """Return this result with the reason why some estimators have no values, unless it has one already."""
        return replace(self, reasons={**{KEYS[name]: reason for name in estimators}, **self.reasons})

    def with_oscillation(self, oscillation: OscillationResult) -> "DirectionalResult":
        """Return this result with the oscillation, and why there is no λ_osc."""
        whole = replace(self, oscillation=oscillation)
        return whole.with_reason([OSCILLATION], oscillation.reason) if oscillation.reason else whole

    @property
    def modules(self) -> ModuleTable | None:
        """Terms of ``lambda_dir`` and ``descent`` by module, which add up to both: ΔθᵢᵀΣⱼHᵢⱼΔθⱼ/gᵀΔθ and gᵢᵀΔθᵢ."""
        if self.terms is None:
            return None
        lr = self.lr or math.nan
        known = self.descent > 0.0 and "hvp" in self.estimates and not math.isnan(self.estimates["hvp"].quadratic)
        columns = {
            "lambda_dir": (self.terms.columns["quadratic"], lr * self.descent if known else math.nan),
            "descent": (self.terms.columns["descent"], lr),
        }
        scaled = {key: tuple(term / unit for term in terms) for key, (terms, unit) in columns.items()}
        return ModuleTable(self.terms.names, scaled)

    def values(self) -> dict[str, float]:
        """Return all values with their errors by key, in units of 1/η; NaN where one could not be measured."""
        lr = self.lr or math.nan  # without a learning rate there is no such unit
        values, room = {}, math.nan
        for name in sorted(set(self.estimators) - {OSCILLATION}, key=_HEADROOM_ORDER.index):
            key = KEYS[name]
            if name == "critical":
                search = self.critical if self.descent > 0.0 else None
                factor, error = (search.factor, search.half_width) if search else (math.nan, math.nan)
                length = torch.tensor(factor, dtype=torch.float64)
                curvature = critical_sharpness(length, lr)
            else:
                one = self.estimates.get(name, _UNKNOWN)
                quadratic, error = torch.tensor(one.quadratic, dtype=torch.float64), one.error
                curvature = directional_curvature(quadratic, self.descent, lr)
                length = headroom(quadratic, self.descent)
                if self.descent <= 0.0:
                    values[f"{key}_numerator"] = one.quadratic / lr**2
            values |= {key: float(curvature), f"{key}_error": error}
            if error <= _HEADROOM_ERROR and math.isnan(room):
                room = float(length)
        if OSCILLATION in self.estimators:
            values |= self.oscillation.values()
        if {"kl", "finite_difference"} & set(self.estimators):
            values["epsilon"] = self.epsilon
        if set(self.estimators) - {OSCILLATION}:
            values["headroom"] = room
        if not math.isnan(self.lr):  # else the step was not recorded, and another monitor may write its edge
            values["two_over_lr"] = 2.0 / self.lr if self.lr else math.inf
        return values | {"descent": self.descent / lr, "update_norm": self.norm / lr}
