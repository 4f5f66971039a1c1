"""Options that monitors share: fields, defaults and rules, stated once for constructors and measurements by hand."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal, TypeVar

from lightning_curvature.arguments import Rule, check_fields, whole
from lightning_curvature.data.loaders import check_dataloader
from lightning_curvature.losses.fixed import ProbeMode
from lightning_curvature.monitors.modules import ByModule
from lightning_curvature.replay.objective import ObjectiveFunction

OnError = Literal["warn", "raise"]
ProbePrecision = Annotated[Literal["32-true"] | None, Rule("None computes in the run's precision")]
Period = Annotated[int, whole(1, "1 measures every optimizer step")]
ProbeSamples = Annotated[int, whole(1, "None takes all training data")]
_OBJECTIVE = Rule("give one that returns the loss of (module, batch)")
_OUTPUTS = Rule("give one such as 'head'", holds=bool, phrase="be a name out of named_modules(), or None")
_PREFIX = Rule(
    "use 'curvature'", holds=lambda text: text == text.strip("/") != "", phrase="be a name without slashes at its ends"
)
_MAX_OVERHEAD = Rule("0.1 lets measurements take a tenth of the time that steps take", above=0.0, most=100.0)
_AT_STEPS = Rule("(0, 100) measures before the first step and before step 100", least=0, empty=True, single=True)
Options = TypeVar("Options", bound="MonitorOptions")


@dataclass(frozen=True, kw_only=True)
class MonitorOptions:
    """Options of every monitor; the classes of the monitors document them.

    Raises:
        ValueError: for a value outside its rule.
    """

    every_n_train_steps: Period | None = 1
    objective: Annotated[ObjectiveFunction, _OBJECTIVE] | None = None
    outputs: Annotated[str, _OUTPUTS] | None = None
    optimizer_index: Annotated[int, whole(0, "0 is the first optimizer")] = 0
    probe_precision: ProbePrecision = None
    max_overhead: Annotated[float, _MAX_OVERHEAD] | None = None
    by_module: ByModule = False
    prefix: Annotated[str, _PREFIX] = "curvature"
    on_error: Annotated[OnError, Rule("'warn' lets training go on")] = "warn"

    @classmethod
    def of(cls: type[Options], arguments: Mapping[str, Any]) -> Options:
        """Take the options out of the arguments of a constructor, its ``locals()``."""
        return cls(**{field.name: arguments[field.name] for field in fields(cls) if field.name in arguments})

    def __post_init__(self) -> None:
        check_fields(self)

    def at_a_point(self: Options) -> Options:
        """Return the options for one measurement by hand, whose step is due, without those of several in a row."""
        return replace(self, every_n_train_steps=1)

    def _normalize(self, **values: Any) -> None:
        """Replace fields of this frozen instance by their normal forms, while it is made."""
        for name, value in values.items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True, kw_only=True)
class ProbeSetOptions(MonitorOptions):
    """Options of the monitors that measure on a probe set."""

    probe_samples: ProbeSamples | None = None
    probe_dataloader: Any = None
    micro_batch_size: Annotated[int, whole(1, "None takes the batch size of the loader")] | None = None
    probe_mode: Annotated[ProbeMode, Rule("'train' leaves the module as it trains")] = "train"
    probe_precision: ProbePrecision = "32-true"
    seed: Annotated[int, whole(0, "0 is as good as any")] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_dataloader("probe_dataloader", self.probe_dataloader)

    @property
    def of_step(self) -> bool:
        """Whether the batches of the coming step are measured."""
        return False

    def keys(self) -> list[str]:
        """Return the keys of all values."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class OccasionalOptions(ProbeSetOptions):
    """Options of the monitors that measure when fit ends, before named steps, every n steps, or by hand."""

    every_n_train_steps: Period | None = None
    at_end: bool = True
    at_steps: Annotated[Sequence[int], _AT_STEPS] = ()
    probe_mode: Annotated[ProbeMode, Rule("'eval' leaves out dropout")] = "eval"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_overhead is not None and self.every_n_train_steps is None:
            raise ValueError(
                f"max_overhead must come with an interval to stretch, got {self.max_overhead} and "
                "every_n_train_steps=None: set every_n_train_steps=."
            )
        self._normalize(at_steps=ascending(self.at_steps))


def ascending(numbers: Iterable[int]) -> tuple[int, ...]:
    """Return numbers as a tuple, each once."""
    return tuple(sorted(set(numbers)))
