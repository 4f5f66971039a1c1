"""The base of monitors that follow optimizer steps: it records the step and keeps its gradient and parameters."""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer

from lightning_curvature.data.first import first_batch
from lightning_curvature.directional.one_step import step_once
from lightning_curvature.directional.problem import Window
from lightning_curvature.distributed.shards import fresh_shards, local
from lightning_curvature.distributed.together import attempted
from lightning_curvature.monitors.base import Monitor
from lightning_curvature.monitors.by_hand import Optimizers, quiet_trainer
from lightning_curvature.optimizers.oscillation import Oscillation, Stepping, Trail, oscillation_of
from lightning_curvature.optimizers.update import ParameterUpdate, dense_copy
from lightning_curvature.replay.objective import StepObjective


@dataclass
class _Step:
    """A measured step, from the first batch of its window to its measurement."""

    number: int = -1  # optimizer steps before it; -1 until the optimizer is about to step
    update: ParameterUpdate | None = None
    stepping: Stepping | None = None  # the optimizer as it was, where the steps before are followed
    segment: int = 0  # manual optimization: which of the optimizer steps of the last batch it is
    gradients: dict[int, Tensor] = field(default_factory=dict)  # after the last backward, by id of the parameter
    differentiated: bool = False
    loss_scale: float = 1.0
    others: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # parameters of other optimizers, with copies
    failure: Exception | None = None


class UpdateMonitor(Monitor):
    """Base of the monitors that measure along the true update.

    On a measured optimizer step it records the calls of ``training_step`` that make the step, keeps the gradients as
    they are after ``backward`` (before clipping, before other callbacks' ``on_before_optimizer_step``, and before the
    ``on_after_backward`` of callbacks that stand after it in the Trainer's list), θ_t and η as of
    ``on_before_optimizer_step``, and calls :meth:`measure` in ``on_train_batch_end``. On other steps its hooks return.
    """

    def _begin(self) -> None:
        super()._begin()
        self._recording = contextlib.ExitStack()
        self._armed = False
        self._step = _Step()
        self._trail: Trail | None = None  # where the steps before a measured one are wanted

    def measure(self, trainer: pl.Trainer, window: Window | None, failure: Exception | None) -> None:
        """Measure a step on every rank; where one did not record it, ``window`` is None, the reason in ``failure``."""
        raise NotImplementedError

    def report(self, trainer: pl.Trainer) -> None:
        """Write what was measured, when everything within the module's reach, maybe a logger, has been put back."""

    def numbers(self) -> Iterable[float]:
        """Return what was measured; a step of which a part failed counts where one of them is a number."""
        return ()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the optimizers, lay out TensorBoard and forget the fit before."""
        self._forget()
        super().on_fit_start(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start recording where the coming optimizer step is to be measured."""
        # A batch whose end was never reported (an interrupted epoch) must not leave its recorder behind.
        self._recording.close()
        self._armed = self._due(trainer)
        if self._armed and self._objective is not None:
            self._recording.enter_context(self._objective.recording(self._note_failure))

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the gradients before anything changes them."""
        if not self._armed or self._step.number == trainer.global_step:
            return
        step, optimizer = self._step, trainer.optimizers[self.options.optimizer_index]
        step.differentiated = True
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        step.loss_scale = float(scaler.get_scale()) if scaler is not None else 1.0
        try:
            with torch.no_grad():
                for p in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
                    kept = step.gradients.get(id(p))
                    if kept is None or p.grad.is_sparse:
                        step.gradients[id(p)] = dense_copy(p.grad)
                    else:
                        kept.copy_(local(p.grad))
        except Exception as error:  # out of memory, most likely
            step.gradients = {}
            self._note_failure(error)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Keep θ_t and η, once a step: LBFGS comes here for each of its closures, at the same ``global_step``."""
        if self._objective is None or optimizer is not trainer.optimizers[self.options.optimizer_index]:
            return
        if self._trail is not None:
            # A batch may make several steps by hand, of which the last is measured.
            more = self._armed and not pl_module.automatic_optimization
            self._trail.pass_by(trainer.global_step, lambda: self._parameters(trainer), more)
        step = self._step
        if not self._armed or step.number == trainer.global_step:
            return
        step.number, step.update = trainer.global_step, None
        records = self._objective.records
        # StochasticWeightAveraging passes over the data once more for BatchNorm: no backward, no step.
        idle = pl_module.automatic_optimization and not step.differentiated
        if idle or not records or step.failure is not None:
            return
        if not pl_module.automatic_optimization:
            step.segment = len(records[-1].backward.segments) - 1
            records[-1].backward.close()
        # Lightning divides each loss by the full number of batches, also where the last window is shorter.
        share = trainer.accumulate_grad_batches / len(records) if pl_module.automatic_optimization else 1.0
        try:
            step.update = ParameterUpdate(optimizer, share / step.loss_scale, step.gradients)
            step.others = _other_parameters(trainer, optimizer)
            step.stepping = Stepping(optimizer) if self._trail is not None else None
        except Exception as error:
            self._note_failure(error)
        step.gradients = {}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure where the batch ended with a step."""
        self._recording.close()
        objective, update, failure = self._objective, self._step.update, self._step.failure
        if not self._armed or objective is None or self._step.number < 0:
            return  # not measured, or an accumulation window that goes on
        try:
            if failure is not None:
                self._miss_step(trainer, objective, failure)
            elif update is not None:
                self._price.begin(objective.device)
                self._measure_step(trainer, pl_module, objective, update)
        finally:
            if failure is not None or update is not None:
                self._tally.measured(self.numbers())
                self.report(trainer)
            self._forget()

    def _measure_step(
        self, trainer: pl.Trainer, module: pl.LightningModule, objective: StepObjective, update: ParameterUpdate
    ) -> None:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(objective.untouched(update.parameters, objective.rewrites.spared()))
                oscillation, unknown = self._oscillation(update)
                update.complete()
                # A discriminator's step was made before the generator's, on the generator as it was then.
                for p, before in self._step.others:
                    local(p).detach().copy_(before)
            except Exception as error:
                self._note_failure(error)
                self._miss_step(trainer, objective, error)
                return
            precision, segment = self._precision(trainer), self._step.segment
            averaged = module.automatic_optimization or objective.function is not None
            modules = self._modules(trainer)
            window = Window(objective, update, objective.records, precision, segment, averaged, modules)
            window.oscillation, window.unknown = oscillation, unknown
            self.measure(trainer, window, None)

    def _oscillation(self, update: ParameterUpdate) -> tuple[Oscillation | None, str]:
        """Return the oscillation of the step, or why there is none."""
        trail, stepping, reasons = self._trail, self._step.stepping, list[str]()
        before = trail.before(update.parameters) if trail is not None else None
        if before is None or stepping is None:
            return None, "it needs the three steps before the measured one"
        found = attempted(lambda: oscillation_of(update, before, stepping), lambda error: reasons.append(str(error)))
        return found, "".join(reasons)

    def _miss_step(self, trainer: pl.Trainer, objective: StepObjective, failure: Exception) -> None:
        """Take part in a measurement of which this rank has nothing to measure."""
        if not objective.rewrites.checked:
            # Where parameters are sharded, the others gather them once to check the step.
            with contextlib.suppress(Exception), fresh_shards(objective.module), objective.gathers.forwards(1):
                raise failure
        self.measure(trainer, None, failure)

    def _trainer_by_hand(self, module: pl.LightningModule, trainer: pl.Trainer | None) -> pl.Trainer:
        return quiet_trainer(module, trainer)

    def _check_optimizers(self, optimizers: Optimizers) -> None:
        if optimizers.missing:
            raise MisconfigurationException(
                f"optimizer must be given for {type(self).__name__}, which measures along its step, got none, and "
                f"{optimizers.missing}: give it as evaluate(module, dataloader, optimizer)."
            )

    def _by_hand(self, trainer: pl.Trainer, module: pl.LightningModule, dataloader: Any) -> Any:
        with first_batch(trainer, dataloader) as batch:
            step_once(trainer, module, batch, self)
        self._tally.raise_if_lost()
        if self.result is None:
            raise MisconfigurationException(
                "training_step must return a loss on the first batch of dataloader, and step by self.optimizers() in "
                "manual optimization, got no step: give a loader that begins with another batch."
            )
        return self.result

    def _seconds_by_hand(self, trainer: pl.Trainer, module: pl.LightningModule, dataloader: Any) -> float:
        """Leave out the step along which it measures, and which has warmed up."""
        self._by_hand(trainer, module, dataloader)
        return self._price.cost

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the recorder off where the epoch ended before the batch did."""
        self._recording.close()

    def _rescue(self, hook: str, error: Exception) -> None:
        """Keep an error from before the end of the step, where the other ranks learn of it; forget a step after it."""
        if hook not in ("on_train_batch_start", "on_after_backward", "on_before_optimizer_step"):
            self._forget()
            super()._rescue(hook, error)
        elif self._objective is not None:
            trainer = self._objective.module.trainer
            self._armed = self._due(trainer)
            if hook == "on_before_optimizer_step":
                self._step.number = trainer.global_step
            self._note_failure(error)

    def _let_go(self) -> None:
        self._forget()
        super()._let_go()

    def _forget(self) -> None:
        self._recording.close()
        if self._objective is not None:
            self._objective.records = []
        self._step = _Step()

    def _note_failure(self, error: Exception) -> None:
        alone = self._objective is None or self._objective.module.trainer.world_size == 1
        if self.options.on_error == "raise" and alone:
            raise error
        # Else it is kept until the end of the step: other ranks would wait for this one.
        self._step.failure = error


@torch.no_grad()
def _other_parameters(trainer: pl.Trainer, optimizer: Optimizer) -> list[tuple[Tensor, Tensor]]:
    """Return the parameters of the other optimizers with copies: these may step before the batch ends."""
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    groups = [group for other in trainer.optimizers for group in other.param_groups]
    others = {id(p): p for group in groups for p in group["params"] if id(p) not in own}
    return [(p, local(p).detach().clone()) for p in others.values()]
