"""Options that monitors share: fields, defaults and rules, stated once for constructors and measurements by hand."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, TypeVar

from lightning_curvature.losses.fixed import ProbeMode
from lightning_curvature.monitors.checks import check_choice, check_count, check_numbers
from lightning_curvature.replay.objective import ObjectiveFunction

OnError = Literal["warn", "raise"]
ProbePrecision = Literal["32-true"] | None
Options = TypeVar("Options", bound="MonitorOptions")


@dataclass(frozen=True, kw_only=True)
class MonitorOptions:
    """Options of every monitor; the classes of the monitors document them.

    Raises:
        ValueError: for a value outside its rule.
    """

    # Whether the monitor may do without periodic measurements.
    _period_is_optional: ClassVar[bool] = False

    every_n_train_steps: int | None = 1
    objective: ObjectiveFunction | None = None
    outputs: str | None = None
    optimizer_index: int = 0
    probe_precision: ProbePrecision = None
    prefix: str = "curvature"
    on_error: OnError = "warn"

    @classmethod
    def of(cls: type[Options], arguments: Mapping[str, Any]) -> Options:
        """Take the options out of the arguments of a constructor, its ``locals()``."""
        return cls(**{field.name: arguments[field.name] for field in fields(cls) if field.name in arguments})

    def __post_init__(self) -> None:
        optional = self._period_is_optional
        check_count("every_n_train_steps", self.every_n_train_steps, 1, "1 measures every optimizer step", optional)
        check_choice("on_error", self.on_error, ("warn", "raise"), "'warn' lets training go on")
        if not isinstance(self.optimizer_index, int) or self.optimizer_index < 0:
            raise ValueError(
                f"optimizer_index must not be negative, got {self.optimizer_index!r}: 0 is the first optimizer."
            )
        if not self.prefix or self.prefix != self.prefix.strip("/"):
            raise ValueError(
                f"prefix must be a name without slashes at its ends, got {self.prefix!r}: use 'curvature'."
            )
        check_choice("probe_precision", self.probe_precision, ("32-true", None), "None computes in the run's precision")

    def _normalize(self, **values: Any) -> None:
        """Replace fields of this frozen instance by their normal forms, while it is made."""
        for name, value in values.items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True, kw_only=True)
class ProbeSetOptions(MonitorOptions):
    """Options of the monitors that measure on a probe set."""

    probe_samples: int | None = None
    probe_dataloader: Any = None
    micro_batch_size: int | None = None
    probe_mode: ProbeMode = "train"
    probe_precision: ProbePrecision = "32-true"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("probe_samples", self.probe_samples, 1, "None takes all training data", optional=True)
        check_count(
            "micro_batch_size", self.micro_batch_size, 1, "None takes the batch size of the loader", optional=True
        )
        check_choice("probe_mode", self.probe_mode, ("train", "eval"), "'train' leaves the module as it trains")

    def keys(self) -> list[str]:
        """Return the keys of all values."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class OccasionalOptions(ProbeSetOptions):
    """Options of the monitors that measure when fit ends, before named steps, every n steps, or by hand."""

    _period_is_optional = True

    every_n_train_steps: int | None = None
    at_end: bool = True
    at_steps: Sequence[int] = ()
    probe_mode: ProbeMode = "eval"

    def __post_init__(self) -> None:
        super().__post_init__()
        remedy = "(0, 100) measures before the first step and before step 100"
        self._normalize(at_steps=check_numbers("at_steps", self.at_steps, remedy, least=0))
