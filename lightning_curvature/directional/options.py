"""Options of the directional curvature: which estimators, how far along the step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from lightning_curvature.arguments import MANY, Rule, positive, sentence, whole
from lightning_curvature.functional import Likelihood
from lightning_curvature.monitors.names import ESTIMATOR_KEYS, DirectionalEstimator, names
from lightning_curvature.monitors.options import MonitorOptions, Period

Estimator = DirectionalEstimator

KEYS = ESTIMATOR_KEYS
_BY_KEY = {name: (key,) for name, key in KEYS.items()}
OSCILLATION: Estimator = "oscillation"
# Estimators that differentiate the model along the step, and those that cannot be computed without outputs.
EXACT, NEED_OUTPUTS = ("hvp", "gauss_newton"), ("kl", "gauss_newton")


@dataclass(frozen=True, kw_only=True)
class DirectionalOptions(MonitorOptions):
    """Options of :class:`~lightning_curvature.DirectionalCurvatureMonitor`, which documents them."""

    estimators: Annotated[Sequence[Estimator], names(_BY_KEY)] = (
        "kl",
        "finite_difference",
    )
    every_n_train_steps: Period = 10
    epsilon: Annotated[float | Literal["auto"], positive("1.0 is as far as the step went")] = "auto"
    likelihood: Annotated[Literal["auto"] | Likelihood, Rule("name the one that is trained")] = "auto"
    kinks: Annotated[Literal["frozen", "crossed"], Rule("'frozen' measures the curvature at θ_t")] = "frozen"
    critical_max_forwards: Annotated[int, whole(3, "a bracket alone takes two", MANY)] = 20
    progress_bar: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.by_module and "hvp" not in self.estimators:
            got = f"{self.by_module!r} with {list(self.estimators)}"
            raise sentence("by_module", "come with the estimator 'hvp'", got, "add it, or leave by_module out")
