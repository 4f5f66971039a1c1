"""The regime of one step, its changes, and the history that is drawn."""

from dataclasses import dataclass, field
from typing import Any

from lightning_curvature.functional.regime import REGIMES, EdgeRatio

# Beyond so many steps every second one is left out of the picture.
_DRAWN = 1000


@dataclass(frozen=True)
class RegimeChange:
    """A step at which the regime has changed.

    Attributes:
        step: the step, as Lightning's own logs count.
        before: regime of the steps before it.
        after: regime of the step.
        edge: distance from the edge at the step.
    """

    step: int
    before: str
    after: str
    edge: EdgeRatio

    def __str__(self) -> str:
        """Return the change in words."""
        ratio = f"{self.edge.value:.3g} of the threshold by {self.edge.source}"
        return f"step {self.step}: {self.after} ({ratio if self.edge.source else self.edge.reason})"


@dataclass(frozen=True)
class RegimeResult:
    """The regime of one step.

    Attributes:
        regime: index into ``lightning_curvature.functional.REGIMES``.
        edge: distance from the edge, its source, and why it is NaN where it is.
        alarm: whether the step gave the alarm.
        last_good: checkpoint from before the last alarm, or the newest one where there was none; None without one.
    """

    regime: int
    edge: EdgeRatio
    alarm: bool
    last_good: str | None = None

    @property
    def name(self) -> str:
        """Of the regime."""
        return REGIMES[self.regime]

    def values(self) -> dict[str, float]:
        """Return the logged numbers by key."""
        return {"regime": float(self.regime), "edge_ratio": self.edge.value, "regime_alarm": float(self.alarm)}


@dataclass
class History:
    """Judged steps, evenly thinned where they are many, and all alarms."""

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    regimes: list[int] = field(default_factory=list)
    alarms: list[int] = field(default_factory=list)

    def add(self, step: int, loss: float, result: RegimeResult) -> None:
        """Add a judged step."""
        columns: list[tuple[list[Any], Any]] = [
            (self.steps, step),
            (self.losses, loss),
            (self.ratios, result.edge.value),
            (self.regimes, result.regime),
        ]
        for column, value in columns:
            column.append(value)
            if len(column) > _DRAWN:
                del column[1::2]
        if result.alarm:
            self.alarms.append(step)
