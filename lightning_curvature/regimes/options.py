"""Options of the monitor of regimes: when it judges, and what is done on an alarm."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from lightning_curvature.arguments import MANY, Rule, fraction, sentence, whole
from lightning_curvature.functional.regime import HORIZON, STEPS, WINDOW
from lightning_curvature.monitors.options import MonitorOptions, Period
from lightning_curvature.regimes.result import RegimeChange

Action = Literal["warn", "checkpoint", "lower_lr", "stop"]
Batches = Literal["auto", "full", "mini"]
_ACTIONS = Rule("an empty list logs alarms and does nothing", phrase="", empty=True)


@dataclass(frozen=True, kw_only=True)
class RegimeOptions(MonitorOptions):
    """Options of :class:`~lightning_curvature.RegimeMonitor`, which documents them."""

    every_n_train_steps: Period = 10
    batches: Annotated[Batches, Rule("'auto' takes one step an epoch for a full batch")] = "auto"
    window: Annotated[int, WINDOW] = 20
    alarm_steps: Annotated[int, STEPS] = 2
    horizon: Annotated[int, HORIZON] = 2
    on_alarm: Annotated[Sequence[Action], _ACTIONS] = ("warn",)
    on_change: Annotated[Callable[[RegimeChange], Any], Rule("give a function of a RegimeChange")] | None = None
    rearm_after: Annotated[int, whole(1, "20 steps let one catapult pass", MANY)] = 20
    lr_factor: Annotated[float, fraction("0.5 halves the learning rate")] = 0.5
    dirpath: Annotated[str, Rule("name a folder", holds=bool, phrase="be a folder, or None")] | None = None
    checkpoint_every_n_steps: Annotated[int, whole(1, "100 saves every hundredth quiet step")] = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if "checkpoint" in self.on_alarm and self.dirpath is None:
            raise sentence("dirpath", "come with the action 'checkpoint'", None, "name the folder of the checkpoints")
