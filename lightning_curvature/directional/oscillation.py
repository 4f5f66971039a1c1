"""λ_osc of one step: the oscillation's numbers of all ranks, evaluations along it, and the result."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from lightning_curvature.directional import evaluations
from lightning_curvature.directional.estimates import Estimate, estimate_again
from lightning_curvature.directional.evaluations import Values
from lightning_curvature.directional.problem import Window
from lightning_curvature.directional.rounding import Numbers, Rounding, balanced_epsilon
from lightning_curvature.functional import oscillation_cosine, oscillation_curvature
from lightning_curvature.functional.oscillation import COSINE_LIMIT
from lightning_curvature.optimizers.oscillation import MOMENTS

_PREFIX = "oscillation_"
# What the ranks exchange before evaluations.
START = tuple(f"{_PREFIX}{name}" for name in (*MOMENTS, "edge", "known"))
_LOST = Estimate(math.nan, math.nan)


@dataclass(frozen=True)
class OscillationResult:
    """The oscillation of one step.

    Attributes:
        square: sᵀPs.
        cosine: cosine between s_t and s_{t−1} in P.
        growth: ‖s_t‖/‖s_{t−1}‖ in P.
        edge: the optimizer's threshold.
        estimate: sᵀHs, NaN where it was not measured.
        reason: why there is no λ_osc; empty where there is.
    """

    square: float = math.nan
    cosine: float = math.nan
    growth: float = math.nan
    edge: float = math.nan
    estimate: Estimate = _LOST
    reason: str = ""

    def values(self) -> dict[str, float]:
        """Return all values by key, NaN where one could not be measured."""
        known = not math.isnan(self.square)
        curvature = oscillation_curvature(self.estimate.quadratic, self.square, self.cosine) if known else math.nan
        return {
            "lambda_osc": curvature,
            "lambda_osc_error": self.estimate.error,
            "oscillation_ratio": curvature / self.edge if self.edge else math.nan,
            "oscillation_edge": self.edge,
            "oscillation_cosine": self.cosine,
            "oscillation_growth": self.growth,
        }


UNKNOWN = OscillationResult()


def numbers(window: Window) -> Values:
    """Return this rank's numbers of the first exchange."""
    bend = window.oscillation
    known = {f"{_PREFIX}known": torch.tensor(float(bend is not None))}
    return known if bend is None else known | {f"{_PREFIX}{name}": value for name, value in bend.moments.items()}


class AlongOscillation:
    """The measurement of λ_osc, from what the first exchange of all ranks says of the oscillation.

    Args:
        start: the numbers of the first exchange.
        why: why this rank does not know the steps before; empty where it does.
        estimators: all estimators: with "hvp" the form is exact, else it comes from two forwards.
        rounding: of a forward.
    """

    def __init__(self, start: Numbers, why: str, estimators: Sequence[str], rounding: Rounding) -> None:
        self._start = {name: start[f"{_PREFIX}{name}"] for name in (*MOMENTS, "edge")} | {"loss": start["loss"]}
        self._rounding, self._form = rounding, "hvp" if "hvp" in estimators else "finite_difference"
        self.result = self._found(start[f"{_PREFIX}known"] == 1.0, why)
        self._epsilon = self._choose_epsilon() if self.wanted else math.nan

    def _found(self, known: bool, why: str) -> OscillationResult:
        """Return what is known before an evaluation."""
        if not known:
            return OscillationResult(reason=why or "the steps before this one are not known on another rank")
        product, now, last, edge = (self._start[name] for name in ("product", "square", "square_before", "edge"))
        if not all(map(math.isfinite, (product, now, last))):
            return OscillationResult(edge=edge, reason="the last steps are not finite")
        cosine, growth = oscillation_cosine(product, now, last), math.sqrt(now / last) if last else math.nan
        flips = f"the path does not flip at each step: the cosine must be below {COSINE_LIMIT}"
        return OscillationResult(now, cosine, growth, edge, reason="" if cosine < COSINE_LIMIT else flips)

    @property
    def wanted(self) -> bool:
        """Whether the loss is to be evaluated along the oscillation, the same on all ranks."""
        return not self.result.reason

    def _choose_epsilon(self) -> float:
        """Return ε, in units of s: rounding is known where the curvature is that of the edge, truncation by ‖θ‖."""
        size, length, square, edge = (self._start[name] for name in ("size", "length", "square", "edge"))
        signal = edge * square if 0.0 < edge < math.inf else square
        noise = math.sqrt(6.0) * self._rounding.worst * max(abs(self._start["loss"]), signal) / signal
        return balanced_epsilon(noise, math.sqrt(size / length))

    def names(self, have_outputs: bool, headed: bool) -> list[str]:
        """Return the names of all numbers that :meth:`evaluated` returns."""
        wanted = evaluations.names([self._form], have_outputs, headed) if self.wanted else []
        return [f"{_PREFIX}{name}" for name in wanted]

    def evaluated(self, window: Window) -> Values:
        """Return this rank's numbers along the oscillation: two passes, or exact, a forward and two backwards."""
        if not self.wanted or window.oscillation is None:
            return {}
        with window.along(window.oscillation.line):
            values = evaluations.forwards(window, self._epsilon, [self._form])
            values |= evaluations.exact(window, [self._form])[0]  # where it fails, "hvp" itself says why
        return {f"{_PREFIX}{name}": value for name, value in values.items()}

    def concluded(self, values: Numbers) -> OscillationResult:
        """Return the result, with sᵀHs of the numbers of all ranks where it was measured."""
        if not self.wanted:
            return self.result
        own = {name.removeprefix(_PREFIX): value for name, value in values.items() if name.startswith(_PREFIX)}
        own |= {"crossed": values["crossed"]} if "crossed" in values else {}
        own |= {"loss": self._start["loss"], "descent": self._start["slope"]}
        one = estimate_again([self._form], own, self._epsilon, self._rounding)[self._form].judged(0.0, 1.0)
        reason = "its error is above 100 %: rounding, truncation or kinks hide it" if math.isnan(one.quadratic) else ""
        return replace(self.result, estimate=one, reason=reason)
