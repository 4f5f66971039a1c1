"""Options of the directional curvature: which estimators, how far along the step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_curvature.functional import LIKELIHOODS
from lightning_curvature.monitors.checks import check_choice, check_count, check_names
from lightning_curvature.monitors.options import MonitorOptions

Estimator = Literal["kl", "finite_difference", "hvp", "gauss_newton", "critical"]

KEYS: dict[str, str] = {
    "hvp": "lambda_dir",
    "finite_difference": "lambda_fd",
    "kl": "lambda_kl",
    "gauss_newton": "lambda_gn",
    "critical": "critical_sharpness",
}
# Estimators that differentiate the model along the step, and those that cannot be computed without outputs.
EXACT, NEED_OUTPUTS = ("hvp", "gauss_newton"), ("kl", "gauss_newton")


@dataclass(frozen=True, kw_only=True)
class DirectionalOptions(MonitorOptions):
    """Options of :class:`~lightning_curvature.DirectionalCurvatureMonitor`, which documents them."""

    estimators: Sequence[Estimator] = ("kl", "finite_difference")
    every_n_train_steps: int | None = 10
    epsilon: float | Literal["auto"] = "auto"
    likelihood: Literal["auto", "categorical", "gaussian", "bernoulli"] = "auto"
    kinks: Literal["frozen", "crossed"] = "frozen"
    critical_max_forwards: int = 20
    progress_bar: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names("estimators", self.estimators, tuple(KEYS))
        if self.epsilon != "auto" and not (isinstance(self.epsilon, (int, float)) and 0.0 < self.epsilon < math.inf):
            raise ValueError(
                f"epsilon must be positive and finite, or 'auto', got {self.epsilon!r}: 1.0 is as far as the step went."
            )
        check_choice("likelihood", self.likelihood, ("auto", *LIKELIHOODS), "name the one that is trained")
        check_choice("kinks", self.kinks, ("frozen", "crossed"), "'frozen' measures the curvature at θ_t")
        check_count("critical_max_forwards", self.critical_max_forwards, 3, "a bracket alone takes two")
        self._normalize(estimators=tuple(dict.fromkeys(self.estimators)))
