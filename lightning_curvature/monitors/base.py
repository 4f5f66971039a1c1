"""The base of all monitors: when to measure, which optimizer to follow, where to write, what a failure does."""

import contextlib
import inspect
from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_curvature.losses.fixed import Precision
from lightning_curvature.monitors.checks import UniqueKey, check_not_quantized, is_lazy
from lightning_curvature.monitors.evaluating import Evaluating
from lightning_curvature.monitors.guard import HOOKS, STARTING, guarded
from lightning_curvature.monitors.options import MonitorOptions
from lightning_curvature.monitors.price import ENOUGH, Price, short, stretched
from lightning_curvature.monitors.strategies import check_strategy
from lightning_curvature.monitors.tally import Tally
from lightning_curvature.replay.objective import StepObjective
from lightning_curvature.reporting.layout import begin
from lightning_curvature.reporting.loggers import inform, warn

# Methods of the module, which Lightning gives to callbacks at the start of every run.
_LENT = frozenset({"log", "log_dict"})


class Monitor(Evaluating):
    """Base of all monitors; each of its options can also be read as an attribute of the monitor."""

    options: MonitorOptions
    result: Any
    # Keys of the state, with the type of each value, and those of them that a state may lack.
    state_types: ClassVar[Mapping[str, type]] = {}
    state_optional: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, options: MonitorOptions) -> None:
        self.options = options
        self._in_hook = self._resumes = self._is_set_up = False
        self._begin()
        self._start_afresh()

    def _begin(self) -> None:
        """Set all that belongs to one fit, and that a copy of a monitor does without; it must not read the others."""
        self._objective: StepObjective | None = None
        self._asked_step, self._is_due = -1, False
        self._is_lazy = False
        self._warned: set[str] = set()
        self._tally, self._price = Tally(), Price()

    def _start_afresh(self) -> None:
        """Set all that is kept after a fit, and that a checkpoint may hold: nothing of it is of use to another fit."""
        self.result = None
        self._interval = self.options.every_n_train_steps or 1

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the fit under way, its module and its data: a copy is a monitor between two fits."""
        blank = object.__new__(type(self))
        blank.options = self.options
        blank._begin()
        of_fit = (vars(blank).keys() - {"options"}) | _LENT
        return {name: value for name, value in vars(self).items() if name not in of_fit}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take up what a copy is given."""
        vars(self).update(state, _in_hook=False)
        self._begin()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Guard the hooks of a class (see :func:`~.monitors.guard.guarded`)."""
        super().__init_subclass__(**kwargs)
        for name in HOOKS & vars(cls).keys():
            setattr(cls, name, guarded(getattr(cls, name)))

    def _rescue(self, hook: str, error: Exception) -> None:
        """Let the run go on after an error in a hook, unless it is the user's mistake or ``on_error`` says otherwise.

        Where the fit begins, the monitor is off for this fit; later it measures again at the next step that is due.
        """
        if hook in STARTING:
            if isinstance(error, ValueError):
                raise error
            self._objective = None
        self._fail(error)

    if not TYPE_CHECKING:  # for users; the package reads ``options``, which mypy checks

        def __getattr__(self, name: str) -> Any:
            """Return an option that the constructor was given."""
            options = vars(self).get("options")
            if options is None or name not in type(options).__dataclass_fields__:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            return getattr(options, name)

    @property
    def state_key(self) -> str:
        """Distinct for monitors with distinct prefixes."""
        key = self._generate_state_key(**self._told_apart_by())
        return key if self._is_set_up else UniqueKey(key)

    def _told_apart_by(self) -> dict[str, Any]:
        """Return the options that tell the states of monitors of this class apart in a checkpoint."""
        return {"prefix": self.options.prefix}

    @guarded
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check that no other monitor of this class has the same prefix, and the training step."""
        if stage == "fit":
            check_strategy(trainer, pl_module, type(self).__name__)
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            alike = other is not self and (isinstance(other, type(self)) or isinstance(self, type(other)))
            if alike and isinstance(other, Monitor) and other.options.prefix == self.options.prefix:
                raise MisconfigurationException(
                    f"prefix must differ between monitors of one class, got {self.options.prefix!r} of two "
                    f"{type(self).__name__}s: give one of them another prefix."
                )
        self._is_set_up = True
        needs_batch = stage == "fit" and self.options.objective is None
        if needs_batch and "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
            raise MisconfigurationException(
                f"{type(self).__name__} must see the batch of a step, got training_step(dataloader_iter): take "
                "(batch, batch_idx) instead."
            )

    @guarded
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check module and optimizers, and the parameters as the strategy has left them, and lay out TensorBoard."""
        check_not_quantized(type(self).__name__, pl_module)
        check_strategy(trainer, pl_module, type(self).__name__)
        count = len(trainer.optimizers)
        if count > 1 and self.options.objective is None:
            raise MisconfigurationException(
                f"{type(self).__name__} needs objective= where several optimizers have losses of their own, got "
                f"{count} optimizers: give a callable (module, batch) -> loss, and optimizer_index= for the optimizer "
                "it belongs to."
            )
        self._check_optimizer_index(trainer)
        if not self._parameters(trainer):
            raise MisconfigurationException(
                f"{type(self).__name__} must find trainable parameters in the optimizer, got none: return it from "
                "configure_optimizers."
            )
        self._begin()
        if not self._resumes:
            self._start_afresh()
        self._resumes, self._is_lazy = False, is_lazy(pl_module)
        device = trainer.strategy.root_device
        self._objective = StepObjective(pl_module, device, self.options.outputs, self.options.objective)
        begin(trainer)

    def _check_optimizer_index(self, trainer: pl.Trainer) -> None:
        count, index = len(trainer.optimizers), self.options.optimizer_index
        if count and index >= count:
            raise MisconfigurationException(
                f"optimizer_index must be below the number of optimizers, got {index} of {count}: count from 0."
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the interval, where it can be another than that of the options."""
        return {} if self.options.max_overhead is None else {"interval": self._interval}

    @guarded
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the state of a checkpoint in the next fit; one that does not fit is left alone, and told."""
        known: Mapping[str, type] = {**self.state_types, "interval": int}
        type_of = {key: type(value).__name__ for key, value in state_dict.items()}
        lacking = sorted(known.keys() - state_dict.keys() - self.state_optional - {"interval"})
        other = sorted(state_dict.keys() - known.keys())
        wrong = [key for key in known if key in state_dict and not isinstance(state_dict[key], known[key])]
        got = [*([f"one without {lacking}"] if lacking else []), *([f"one with {other}"] if other else [])]
        got += [f"{key!r} of type {type_of[key]}" for key in wrong]
        if not got:
            self._resumes = True
            self._take_up(state_dict)
            return
        message = (
            f"the state of a {type(self).__name__} must hold {sorted(self.state_types)}, got {', '.join(got)}: it "
            "starts without; resume with the monitor that the checkpoint was made with."
        )
        if self.options.on_error == "raise":
            raise ValueError(message)
        warn(message)

    def _take_up(self, state_dict: dict[str, Any]) -> None:
        """Take up a state that fits."""
        if self.options.max_overhead is not None:
            self._interval = state_dict.get("interval", self._interval)

    @guarded
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say why nothing was measured, where that is so, and the price of what was."""
        self._tally.tell(type(self).__name__, trainer)
        self._tell_price(trainer, 1)

    @guarded
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let go of the module."""
        self._let_go()

    @guarded
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Let go of the module: Lightning does not come to ``teardown`` after an error."""
        self._resumes = False
        self._let_go()

    def _let_go(self) -> None:
        self._objective = None
        for name in _LENT:
            vars(self).pop(name, None)

    def _due(self, trainer: pl.Trainer) -> bool:
        """Whether the step that a batch begins is to be measured; to be asked at the start of every batch."""
        self._price.pass_by(trainer)
        is_due = self._objective is not None and self._begins_due(trainer)
        self._tally.ask(trainer, is_due)
        self._tell_price(trainer)
        return is_due

    def _begins_due(self, trainer: pl.Trainer) -> bool:
        """Whether the step that a batch begins is one of those that the options name.

        In manual optimization a batch may make several steps: then the first that begins at or after 0, n, 2n, … Of a
        lazy module it is the first that begins with parameters.
        """
        if (step := trainer.global_step) != self._asked_step:
            self._is_due = self._passes(step)
            if self._is_due and self.options.max_overhead is not None:
                self._stretch(trainer, self.options.max_overhead)
                self._is_due = self._passes(step)
            self._asked_step = step
        if self._is_lazy:
            self._is_lazy = self._objective is not None and is_lazy(self._objective.module)
            self._is_due &= not self._is_lazy
        return self._is_due

    def _passes(self, step: int) -> bool:
        passed = 0 <= self._asked_step < step - step % self._interval
        return passed or step % self._interval == 0 or (self._is_lazy and self._asked_step >= 0)

    def _stretch(self, trainer: pl.Trainer, bound: float) -> None:
        """Choose the interval by what measurements have cost so far; the same on all ranks."""
        cost, steps = self._price.together(trainer)
        interval = stretched(self._interval, steps, bound, self.options.every_n_train_steps or 1)
        if interval != self._interval:
            self._interval = interval
            inform(
                f"{type(self).__name__}: every_n_train_steps is {interval} now, by max_overhead={bound}: a measurement "
                f"takes {short(cost)} s, the time of {short(steps)} steps."
            )

    def _tell_price(self, trainer: pl.Trainer, enough: int = ENOUGH) -> None:
        interval = self._interval if self.options.every_n_train_steps else None
        self._price.tell(type(self).__name__, trainer, interval, enough)

    def _precision(self, trainer: pl.Trainer) -> Precision:
        """Return a function that makes the context of a forward on probe data."""
        of_step = trainer.precision_plugin.train_step_context
        if self.options.probe_precision is None:
            return of_step

        @contextlib.contextmanager
        def without_autocast() -> Generator[None, None, None]:
            with of_step(), torch.autocast(trainer.strategy.root_device.type, enabled=False):
                yield

        return without_autocast

    def _warn_once(self, about: str, message: str) -> None:
        """Warn the first time in a fit: a message with a number in it would be a new one each time."""
        if about not in self._warned:
            self._warned.add(about)
            warn(message)

    def _fail(self, error: Exception) -> None:
        """Handle a failed measurement as ``on_error`` says."""
        self._tally.fail(error)
        if self.options.on_error == "raise" or isinstance(error, MisconfigurationException):
            raise error
        if self._objective is not None and error is self._objective.refusal:  # which is that of all later steps
            if "refusal" in self._warned:
                return
            self._warned.add("refusal")
        warn(f"{type(self).__name__} logs NaN: {type(error).__name__}: {error}", any_rank=True)
