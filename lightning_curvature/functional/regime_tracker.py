"""Regime and alarm of one step after the other, from what is known of the steps before it."""

import itertools
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from lightning_curvature.functional.oscillation import COSINE_LIMIT

REGIMES: tuple[str, ...] = (
    "unknown",
    "flat",
    "descent",
    "progressive sharpening",
    "noise-driven oscillation",
    "edge of stability",
    "catapult",
    "diverging",
)
UNKNOWN, FLAT, DESCENT, SHARPENING, NOISE, EDGE, CATAPULT, DIVERGING = range(len(REGIMES))

# A loss of this many times its least one in the window is a spike; back below the second factor, the spike is over.
DOUBLED, OVER = 2.0, 1.5
# Beyond the first factor a spike is a divergence where the sharpness has not fallen, beyond the second in any case:
# where parameters have gone, so has the meaning of their sharpness. Either counts for three steps from the last rise,
# since a loss may rise by turns.
_LOST, _GONE, _RISEN = 10.0, 1e4, 3
# Of mini-batches: a spike also stands out of the scatter of log L, far beyond normal numbers.
_OUTLIER = 6.0
# The edge begins below 1, since λ_osc is a lower bound and λ_max is known to a tolerance. It is left further below:
# in each cycle of self-stabilization the sharpness falls by a few per cent.
_ENTER, _LEAVE = 0.95, 0.9
# Sharpness that rises by more than this over the measurements kept sharpens. Its own error is a tenth of it.
_RISE, _KEPT = 0.005, 5
_FALLEN = 0.98
# Changes within a window that are smaller, relative to the loss, are none.
_STILL = 1e-3
# Fewer losses have no trend, and one within three standard errors of zero is none.
_FEWEST, _SIGNIFICANT = 8, 3.0
# The median distance from the median, times this, is the standard deviation of normal numbers.
_NORMAL = 1.4826
# A level to which the loss has jumped counts as a level of its own after so many windows, the last without a rise.
_LONG = 5


class _Kept:
    """A state of plain numbers and lists."""

    def state_dict(self) -> dict[str, Any]:
        """Return the fields, as a checkpoint holds them."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}  # type: ignore[arg-type]
        return {name: list(value) if isinstance(value, deque) else value for name, value in values.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up fields."""
        for name, value in state.items():
            before = getattr(self, name)
            setattr(self, name, deque(value, before.maxlen) if isinstance(before, deque) else value)


@dataclass
class RegimeTracker(_Kept):
    """The regime of each step, by :func:`~lightning_curvature.functional.regime`, which documents it.

    Attributes:
        window: how many losses are kept.
        losses: the last ones, none of a spike.
        sharpness: the last measured ones.
        ratio, cosine: the last measured ones, or NaN.
        at_edge: whether the edge has been reached and not left.
        base: loss before the spike under way, 0 without one.
        top: the largest loss of the spike.
        age, since: steps since it began, and since that largest loss.
        before: sharpness before it, or NaN.
    """

    window: int = 20
    losses: deque[float] = field(default_factory=deque)
    sharpness: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT))
    ratio: float = math.nan
    cosine: float = math.nan
    at_edge: bool = False
    base: float = 0.0
    top: float = 0.0
    age: int = 0
    since: int = 0
    before: float = math.nan

    def __post_init__(self) -> None:
        self.losses = deque(self.losses, self.window)

    def update(
        self, loss: float, edge_ratio: float = math.nan, sharpness: float = math.nan, cosine: float = math.nan
    ) -> int:
        """Return the index in ``REGIMES`` of a step; NaN stands for what was not measured at it."""
        if not math.isnan(edge_ratio):
            self.ratio = edge_ratio
            self.at_edge = edge_ratio >= (_LEAVE if self.at_edge else _ENTER)
        if not math.isnan(cosine):
            self.cosine = cosine
        spiking = self._spikes(loss)
        if not math.isnan(sharpness):
            self.sharpness.append(sharpness)
        if not math.isfinite(loss):
            return DIVERGING
        if spiking:
            fallen = bool(self.sharpness) and self.sharpness[-1] < _FALLEN * self.before
            lost = self.top > (_GONE if fallen else _LOST) * self.base
            return DIVERGING if lost and self.since < _RISEN else CATAPULT
        self.losses.append(loss)
        if self.at_edge:
            return EDGE
        if self._sharpens():
            return SHARPENING
        return self._by_loss()

    def _spikes(self, loss: float) -> bool:
        """Whether the step is one of a spike, and note where one begins or ends."""
        if self.base:
            self.age, self.since = self.age + 1, 0 if loss >= self.top else self.since + 1
            self.top = max(self.top, loss)
            if loss < OVER * self.base:
                self.base = 0.0
            elif self.age > _LONG * self.window and self.since > self.window:
                self.base = 0.0
                self.losses.clear()
            return bool(self.base)
        least = min(self.losses, default=math.inf)
        if len(self.losses) < _FEWEST or least <= 0.0 or not loss > DOUBLED * least:
            return False
        sizes = [math.log(one) for one in self.losses]
        if math.isfinite(loss) and math.log(loss) < _median(sizes) + _OUTLIER * trend(sizes)[1]:
            return False
        self.base, self.top, self.age, self.since = least, loss, 0, 0
        self.before = self.sharpness[-1] if self.sharpness else math.nan
        return True

    def _sharpens(self) -> bool:
        kept = list(self.sharpness)
        return len(kept) == _KEPT and kept[-1] - kept[0] > _RISE * abs(kept[0]) and kept[-1] == max(kept)

    def _by_loss(self) -> int:
        if len(self.losses) < _FEWEST:
            return UNKNOWN
        change, scatter, level = trend(self.losses)
        still = _STILL * level
        error = scatter * math.sqrt(12.0 / len(self.losses))
        if change < -max(_SIGNIFICANT * error, still):
            return DESCENT
        if scatter <= still and abs(change) <= still:
            return FLAT
        # Away from the edge, as far as is known: by a ratio, or by a path that does not oscillate with period two.
        away = self.ratio < _ENTER or self.cosine > COSINE_LIMIT
        return NOISE if away and change <= max(_SIGNIFICANT * error, still) else UNKNOWN


@dataclass
class AlarmTracker(_Kept):
    """The alarm of each step, by :func:`~lightning_curvature.functional.catapult_alarm`, which documents it.

    Attributes:
        steps, horizon, window: arguments of that function.
        losses: those before the step.
        streak: measured steps in a row that oscillate and grow.
    """

    steps: int = 2
    horizon: int = 2
    window: int = 20
    losses: deque[float] = field(default_factory=deque)
    streak: int = 0

    def __post_init__(self) -> None:
        self.losses = deque(self.losses, self.window)

    def update(self, loss: float, cosine: float = math.nan, growth: float = math.nan) -> bool:
        """Return whether a step gives the alarm; NaN stands for what was not measured at it."""
        least = min(self.losses, default=math.inf)
        self.losses.append(loss)
        if not math.isnan(cosine) and not math.isnan(growth):
            self.streak = self.streak + 1 if cosine < COSINE_LIMIT and growth > 1.0 else 0
            if self.streak >= self.steps and self._doubles(loss, least, growth):
                return True
        return not math.isfinite(loss)

    def _doubles(self, loss: float, least: float, growth: float) -> bool:
        """Whether what the loss has risen by doubles the least one within the horizon, growing as the oscillation."""
        if not 0.0 < least < loss:
            return False
        # In logarithms, as the power may be too large for a float.
        return math.log(loss - least) + 2.0 * self.horizon * math.log(growth) > math.log((DOUBLED - 1.0) * least)


def trend(losses: Sequence[float] | deque[float]) -> tuple[float, float, float]:
    """Return the change of a straight line through losses, the scatter of single ones about it, and their mean size.

    The scatter comes from differences of neighbours, so that neither a slope nor a few outliers count: white noise of
    standard deviation s has differences of √2 s. The change of a line through n points with such noise has the standard
    error s √(12/n) for large n.
    """
    values, count = list(losses), len(losses)
    middle = (count - 1) / 2.0
    slope = sum((i - middle) * value for i, value in enumerate(values)) * 12.0 / (count * (count**2 - 1))
    steps = [after - before for before, after in itertools.pairwise(values)]
    centre = _median(steps)
    scatter = _NORMAL * _median([abs(step - centre) for step in steps]) / math.sqrt(2.0)
    return slope * (count - 1), scatter, sum(map(abs, values)) / count


def _median(values: Sequence[float] | deque[float]) -> float:
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else 0.5 * (ordered[half - 1] + ordered[half])
