"""The stability index over the last measured steps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from lightning_curvature.functional import mean_square_index
from lightning_curvature.stability.options import KEYS, LEAST


@dataclass(frozen=True)
class Terms:
    """Terms of the index from one measured step, or sums of them.

    With m the product of the batch's Hessian with x, V its variance over mini-batches, P the preconditioner, T the
    threshold of the full batch and r = (1 + β)/(1 − β):

    Attributes:
        drift: (m² − V)/(TP).
        noise: rV/(TP).
        variance: V/(TP).
        form: xᵀm.
    """

    drift: float
    noise: float
    variance: float
    form: float


@dataclass(frozen=True)
class StabilityResult:
    """The stability index.

    Attributes:
        steps: the terms of the measured steps, the newest last.
        nesterov: β of Nesterov's momentum, with which the index is not the sum of drift and noise; else None.
        ready: whether the average has been formed, so that this step could be measured.
    """

    steps: Sequence[Terms] = ()
    nesterov: float | None = None
    ready: bool = True

    unready: ClassVar[str] = "the average of the parameters has seen too few steps"

    @property
    def reasons(self) -> dict[str, str]:
        """Why values are NaN, by key."""
        said = ""
        if not self.ready:
            said = self.unready
        elif len(self.steps) < LEAST:
            said = f"it takes {LEAST} measured steps, and there are {len(self.steps)}"
        elif math.isnan(self.values()["stability_index"]):
            said = "the curvature along the displacement is not positive in the mean"
        return dict.fromkeys(KEYS[:-1], said) if said else {}

    def values(self) -> dict[str, float]:
        """Return index, standard error, both parts and the number of measured steps, by key."""
        count, sums = len(self.steps), _sum(self.steps)
        known = self.ready and count >= LEAST
        index = self._index(sums) if known else math.nan
        form = sums.form if math.isfinite(index) else math.nan
        return dict(
            zip(
                KEYS,
                (index, self._error() if known else math.nan, sums.drift / form, sums.noise / form, float(count)),
                strict=True,
            )
        )

    def _index(self, terms: Terms) -> float:
        """Return the index of one sum of terms."""
        if not terms.form > 0.0:
            return math.nan
        drift, noise, variance = (term / terms.form for term in (terms.drift, terms.noise, terms.variance))
        if self.nesterov is None:
            return drift + noise
        unit = (2.0 + 2.0 * self.nesterov) / (1.0 + 2.0 * self.nesterov)  # Tη: curvatures in units of 1/η
        curvature = drift * unit
        return mean_square_index(curvature, max(variance * unit * curvature, 0.0), 1.0, self.nesterov, nesterov=True)

    def _error(self) -> float:
        """Return the jackknife's standard error over the measured steps."""
        count = len(self.steps)
        without = [self._index(_sum([*self.steps[:k], *self.steps[k + 1 :]])) for k in range(count)]
        mean = sum(without) / count
        return math.sqrt((count - 1) / count * sum((one - mean) ** 2 for one in without))


def _sum(steps: Sequence[Terms]) -> Terms:
    return Terms(*(math.fsum(getattr(one, name) for one in steps) for name in ("drift", "noise", "variance", "form")))
