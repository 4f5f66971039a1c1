"""The monitor of regimes and alarms."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, NoReturn

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_curvature.functional.regime import REGIMES
from lightning_curvature.functional.regime_tracker import CATAPULT, AlarmTracker, RegimeTracker
from lightning_curvature.monitors.base import Monitor
from lightning_curvature.monitors.options import OnError
from lightning_curvature.optimizers.lowering import lower_learning_rate
from lightning_curvature.optimizers.stability import stability_rule
from lightning_curvature.regimes.checkpoints import QuietCheckpoints
from lightning_curvature.regimes.hearing import EdgeMeter, Heard, losses_over_ranks, take_place_behind_others
from lightning_curvature.regimes.options import Action, Batches, RegimeOptions
from lightning_curvature.regimes.picture import report_history
from lightning_curvature.regimes.result import History, RegimeChange, RegimeResult
from lightning_curvature.reporting.layout import begin
from lightning_curvature.reporting.loggers import logged_step, tensorboards, warn


class RegimeMonitor(Monitor):
    r"""Log the regime of training, and act before a catapult.

    It measures nothing: it reads the training loss of each step, and what other monitors with the same ``prefix`` write
    at the step: ``lambda_max`` or ``preconditioned_lambda_max``, ``lambda_osc`` with its cosine and growth,
    ``stability_index``. It moves behind them in the Trainer's list. Keys, each as ``<prefix>/<key>``:

    * ``regime``: index into ``functional.REGIMES``, by :func:`~lightning_curvature.functional.regime`; its changes are
      a text on TensorBoard, and the picture at the end of fit and at alarms has each stretch in its colour.
    * ``edge_ratio``: :func:`~lightning_curvature.functional.edge_ratio` with the threshold that the optimizer has now;
      ``result.edge`` says which measurement it comes from, or why it is NaN. Between measurements the last one stands.
    * ``regime_alarm``: 1 where :func:`~lightning_curvature.functional.catapult_alarm` gives an alarm, otherwise 0.

    A step is judged where it is due, and where something was heard. An alarm needs the cosine and growth of the
    oscillation at every step, from ``DirectionalCurvatureMonitor(estimators=("oscillation",), every_n_train_steps=1)``,
    which full batches have; of mini-batches a loss that is not finite is the only alarm. Other steps keep their loss on
    the device. A judged step takes one synchronization, and one all-reduce of the losses where there are several ranks,
    which so judge and act alike.

    Actions on an alarm, on all ranks:

    * "warn".
    * "checkpoint": quiet steps are saved to ``dirpath``, each file in place of the one before it; the last one from
      before the alarm is kept. ``result.last_good`` is its path.
    * "lower_lr": the learning rates of the followed optimizer, and all that its schedulers go by, are multiplied by
      ``lr_factor``: every later learning rate is the scheduled one times this factor, for the schedulers of torch, and
      for others whose attributes have the same names. A learning rate that the module sets by itself is not lowered.
    * "stop": ``trainer.should_stop``, which respects ``min_steps`` and ``min_epochs``.

    Without an action the run is bit-identical to the run without the monitor.

    Args:
        every_n_train_steps: judge optimizer steps 0, n, 2n, …, beside those at which something was heard.
        batches: whether a step sees all the data: "full", "mini", or "auto": full where an epoch has one step.
        window: number of losses that are looked at.
        alarm_steps: measured steps in a row that must show an instability.
        horizon: steps within which the loss must be about to double.
        on_alarm: names of actions; empty for none.
        on_change: called as on_change(change) on every rank with a :class:`~lightning_curvature.RegimeChange`.
        rearm_after: steps after an alarm in which no other is given.
        lr_factor: between 0 and 1.
        dirpath: folder of the checkpoints.
        checkpoint_every_n_steps: quiet steps are saved no more often.
        optimizer_index: which optimizer's threshold counts, and whose learning rate is lowered.
        prefix: prefix of the keys, also of those that it reads.
        on_error: "warn" lets the run go on after an unexpected error, "raise" raises.

    Raises:
        ValueError: for an argument outside its rule.

    Source: docs/regimes.md, which has the confusion table, and how many catapults are announced.
    """

    options: RegimeOptions
    result: RegimeResult | None
    state_types: ClassVar[Mapping[str, type]] = {"tracker": dict, "alarm": dict, "history": dict, "progress": dict}

    def __init__(
        self,
        *,
        every_n_train_steps: int = RegimeOptions.every_n_train_steps,
        batches: Batches = RegimeOptions.batches,
        window: int = RegimeOptions.window,
        alarm_steps: int = RegimeOptions.alarm_steps,
        horizon: int = RegimeOptions.horizon,
        on_alarm: Sequence[Action] = RegimeOptions.on_alarm,
        on_change: Callable[[RegimeChange], Any] | None = RegimeOptions.on_change,
        rearm_after: int = RegimeOptions.rearm_after,
        lr_factor: float = RegimeOptions.lr_factor,
        dirpath: str | None = RegimeOptions.dirpath,
        checkpoint_every_n_steps: int = RegimeOptions.checkpoint_every_n_steps,
        optimizer_index: int = RegimeOptions.optimizer_index,
        prefix: str = RegimeOptions.prefix,
        on_error: OnError = RegimeOptions.on_error,
    ) -> None:
        super().__init__(RegimeOptions.of(locals()))

    def _begin(self) -> None:
        super()._begin()
        self._global_step = -1
        # Losses of the batches of the step under way, and of the steps that are not judged yet; None for no loss.
        self._batch_losses: list[Tensor | None] = []
        self._step_losses: list[Tensor | None] = []
        self._heard_instability = False

    def _start_afresh(self) -> None:
        super()._start_afresh()
        options = self.options
        self._tracker = RegimeTracker(options.window)
        self._alarms = AlarmTracker(options.alarm_steps, options.horizon, options.window)
        self._history = History()
        name = options.prefix.replace("/", "-")
        self._checkpoints = QuietCheckpoints(options.dirpath or "", name, options.checkpoint_every_n_steps)
        self._regime, self._last_alarm = 0, -math.inf
        self._meter = EdgeMeter()
        # Losses of steps that a checkpoint has left to be judged.
        self._left: list[float] = []

    def state_dict(self) -> dict[str, Any]:
        """Return all that the regimes of later steps depend on, and the picture so far."""
        # Of several ranks those of this one, whose checkpoint all take up.
        left = self._left + [float(loss) for loss in self._step_losses if loss is not None]
        progress: dict[str, Any] = {"regime": self._regime, "last_alarm": self._last_alarm, "left": left}
        progress |= {"curvature": self._meter.curvature, "checkpoints": self._checkpoints.state_dict()}
        history = {name: list(column) for name, column in vars(self._history).items()}
        tracker, alarm = self._tracker.state_dict(), self._alarms.state_dict()
        return {"tracker": tracker, "alarm": alarm, "history": history, "progress": progress}

    def _take_up(self, state_dict: dict[str, Any]) -> None:
        progress = state_dict["progress"]
        if not progress:
            return
        self._tracker.load_state_dict(state_dict["tracker"])
        self._alarms.load_state_dict(state_dict["alarm"])
        self._history = History(**state_dict["history"])
        self._regime, self._last_alarm = progress["regime"], progress["last_alarm"]
        self._meter.curvature, self._left = progress["curvature"], progress["left"]
        self._checkpoints.load_state_dict(progress["checkpoints"])

    def charted(self, trainer: pl.Trainer) -> dict[str, list[str]]:
        """Chart the regime with its alarms, and the edge ratio."""
        return {"regime": ["regime", "regime_alarm"], "edge ratio": ["edge_ratio"]}

    def check_at_a_point(self) -> NoReturn:
        """Raise: a regime has no value at one point."""
        raise MisconfigurationException(
            "RegimeMonitor needs the losses of a fit, step after step, got a module at one point: give it to a Trainer "
            "as a callback, or call functional.regime on a logged run."
        )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the place behind the monitors that it listens to."""
        self._check_optimizer_index(trainer)
        self._begin()
        if not self._resumes:
            self._start_afresh()
        self._resumes = False
        self._global_step = trainer.global_step
        if not take_place_behind_others(trainer, self, self.options.prefix):
            warn(
                f"RegimeMonitor must find monitors of the prefix {self.options.prefix!r} to listen to, got none: it "
                "judges by the loss alone; add HessianSpectrumMonitor() for the edge, and for alarms "
                "DirectionalCurvatureMonitor(estimators=('oscillation',), every_n_train_steps=1)."
            )
        begin(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take up the loss, and judge the step where it is due or something was heard."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
        if isinstance(loss, Tensor):
            # Lightning has divided it, in automatic optimization.
            batches = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
            loss = loss.detach().mean() * batches
        self._batch_losses.append(loss if isinstance(loss, Tensor) else None)
        if trainer.global_step == self._global_step:
            return
        self._global_step = trainer.global_step
        known = [one for one in self._batch_losses if one is not None]
        self._step_losses.append(torch.stack(known).double().mean() if known else None)
        self._batch_losses = []
        step, heard = logged_step(trainer), Heard.now(trainer, self.options.prefix)
        if heard is not None or step % (self.options.every_n_train_steps or 1) == 0:
            self._judge(trainer, step, heard or Heard())

    def _judge(self, trainer: pl.Trainer, step: int, heard: Heard) -> None:
        """Judge all steps since the last one that was judged, write the last of them, and act."""
        losses = [*self._left, *losses_over_ranks(trainer, self._step_losses)]
        self._left, self._step_losses = [], []
        *before, loss = losses
        if loss is None:
            self._warn_once(
                "loss", "RegimeMonitor must find a loss in what training_step returns, got none: return it."
            )
            return
        fired = False
        for one in before:
            if one is not None:
                self._tracker.update(one)
                fired |= self._alarms.update(one)
        rule = stability_rule(trainer.optimizers[self.options.optimizer_index])
        edge, sharpness = self._meter.edge(heard, rule, self._full_batch(trainer))
        self._heard_instability |= not math.isnan(heard.oscillation_growth)
        regime = self._tracker.update(loss, edge.value, sharpness, heard.oscillation_cosine)
        fired |= self._alarms.update(loss, heard.oscillation_cosine, heard.oscillation_growth)
        alarm = fired and step - self._last_alarm >= self.options.rearm_after
        change = RegimeChange(step, REGIMES[self._regime], REGIMES[regime], edge) if regime != self._regime else None
        self._regime, self._last_alarm = regime, step if alarm else self._last_alarm
        if alarm:
            self._checkpoints.keep(trainer)
        self.result = RegimeResult(regime, edge, alarm, self._checkpoints.last_good)
        self._history.add(step, loss, self.result)
        # First what all ranks must do alike; then what may fail on one of them, its loggers or the user's function.
        if alarm:
            self._act(trainer)
        quiet = not fired and not self._alarms.streak and regime < CATAPULT
        if "checkpoint" in self.options.on_alarm and quiet and step - self._last_alarm >= self.options.rearm_after:
            self._checkpoints.save_when_due(trainer)
            self.result = replace(self.result, last_good=self._checkpoints.last_good)
        self._tell(trainer, self.result, change)

    def _full_batch(self, trainer: pl.Trainer) -> bool:
        if self.options.batches == "auto":
            return trainer.num_training_batches <= trainer.accumulate_grad_batches
        return self.options.batches == "full"

    def _act(self, trainer: pl.Trainer) -> None:
        """Change the run as it is asked for on an alarm."""
        options = self.options
        if "lower_lr" in options.on_alarm:
            optimizer = trainer.optimizers[options.optimizer_index]
            bare = getattr(optimizer, "optimizer", optimizer)
            configured = [config.scheduler for config in trainer.lr_scheduler_configs]
            schedulers = [one for one in configured if getattr(one, "optimizer", bare) is bare]
            lower_learning_rate(optimizer, schedulers, options.lr_factor)
        if "stop" in options.on_alarm:
            trainer.should_stop = True

    def _tell(self, trainer: pl.Trainer, result: RegimeResult, change: RegimeChange | None) -> None:
        """Write the values of a step, say what has changed, and warn of an alarm."""
        options = self.options
        self._write(trainer, result.values())
        if change is not None and trainer.is_global_zero:
            for logger in tensorboards(trainer):
                logger.experiment.add_text(f"{options.prefix}/regime", str(change), change.step)
        if result.alarm:
            report_history(trainer, f"{options.prefix}/regime_picture", self._history)
            if "warn" in options.on_alarm:
                kept = f" Last good checkpoint: {result.last_good}." if result.last_good else ""
                warn(
                    f"RegimeMonitor gives an alarm at step {self._last_alarm}: the loss is about to double, or not "
                    f"finite; edge ratio {result.edge.value:.3g}.{kept}"
                )
        if change is not None and options.on_change is not None:
            options.on_change(change)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the picture, and say where no alarm could be given."""
        report_history(trainer, f"{self.options.prefix}/regime_picture", self._history)
        if self.options.on_alarm and not self._heard_instability and self._history.steps:
            warn(
                f"RegimeMonitor must hear of an oscillation to give alarms, got none in {trainer.global_step} steps: "
                "add DirectionalCurvatureMonitor(estimators=('oscillation',), every_n_train_steps=1), or on_alarm=()."
            )
