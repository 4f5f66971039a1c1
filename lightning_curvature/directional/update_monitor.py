"""The part of a monitor that follows optimizer steps: when to measure, what made the step, what it did."""

from __future__ import annotations

import contextlib
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_curvature.directional.probes import Window
from lightning_curvature.distributed.shards import local
from lightning_curvature.monitors.base import Monitor
from lightning_curvature.optimizers.update import ParameterUpdate, dense_copy
from lightning_curvature.replay.isolation import untouched


class UpdateMonitor(Monitor):
    """Base of the monitors that measure along the true update.

    On a measured optimizer step it records the calls of ``training_step`` that make the step, keeps the gradients as
    they are after ``backward`` (before clipping, before other callbacks' ``on_before_optimizer_step``, and before the
    ``on_after_backward`` of callbacks that stand after it in the Trainer's list), θ_t and η
    as of ``on_before_optimizer_step``, and calls :meth:`measure` in ``on_train_batch_end``. On other steps its hooks
    compare two integers.

    Args:
        **options: those of :class:`~lightning_curvature.monitors.base.Monitor`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._recording = contextlib.ExitStack()
        self._armed = False
        self._update: ParameterUpdate | None = None
        self._update_step = -1
        self._segment = 0
        self._gradients: dict[int, Tensor] = {}
        self._differentiated = False
        self._others: list[tuple[Tensor, Tensor]] = []
        self._loss_scale = 1.0
        self._failure: Exception | None = None

    def measure(self, trainer: pl.Trainer, window: Window | None, failure: Exception | None) -> None:
        """Measure a completed step; ``window`` is None, with the reason in ``failure``, where it could not be recorded.

        Called on every rank, so that ranks which failed take part in what is communicated.
        """
        raise NotImplementedError

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the optimizers, lay out TensorBoard and forget the fit before."""
        super().on_fit_start(trainer, pl_module)
        self._forget()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start recording where the coming optimizer step is to be measured."""
        # A batch whose end was never reported (an interrupted epoch) must not leave its recorder behind.
        self._recording.close()
        self._armed = self._due(trainer)
        if not self._armed or self._objective is None:
            return
        self._recording.enter_context(self._objective.recording(self._note_failure))

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the gradients before anything changes them."""
        if not self._armed or self._update_step == trainer.global_step:
            return
        self._differentiated = True
        optimizer = trainer.optimizers[self.optimizer_index]
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._loss_scale = float(scaler.get_scale()) if scaler is not None else 1.0
        try:
            with torch.no_grad():
                for p in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
                    self._keep_gradient(p)
        except Exception as error:  # out of memory, most likely
            self._gradients = {}
            self._note_failure(error)

    def _keep_gradient(self, p: Tensor) -> None:
        kept = self._gradients.get(id(p))
        if kept is None or p.grad is None or p.grad.is_sparse:
            self._gradients[id(p)] = dense_copy(p.grad)
        else:
            kept.copy_(local(p.grad))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Keep θ_t and η, once a step: LBFGS comes here for each of its closures, at the same ``global_step``."""
        if not self._armed or self._objective is None:
            return
        step = trainer.global_step
        if step == self._update_step or optimizer is not trainer.optimizers[self.optimizer_index]:
            return
        self._update_step, self._update = step, None
        records = self._objective.records
        if not records or self._failure is not None:
            return
        if pl_module.automatic_optimization and not self._differentiated:
            return  # StochasticWeightAveraging passes over the data once more for BatchNorm: no backward, no step
        if not pl_module.automatic_optimization:
            self._segment = len(records[-1].backward.segments) - 1
            records[-1].backward.close()
        try:
            self._update = ParameterUpdate(optimizer, self._gradient_scale(trainer, pl_module), self._gradients)
            self._others = _other_parameters(trainer, optimizer)
        except Exception as error:
            self._note_failure(error)
        self._gradients = {}

    def _gradient_scale(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> float:
        """Factor from the kept gradients to those of the window's mean loss."""
        assert self._objective is not None
        if not pl_module.automatic_optimization:
            return 1.0 / self._loss_scale
        # Lightning divides each loss by the full number of batches, also where the last window is shorter.
        return trainer.accumulate_grad_batches / len(self._objective.records) / self._loss_scale

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure where the batch ended with a step."""
        self._recording.close()
        objective, update, failure = self._objective, self._update, self._failure
        if not self._armed or objective is None or self._update_step < 0:
            return  # not measured, or an accumulation window that goes on
        try:
            if update is None or failure is not None:
                if failure is not None:
                    self.measure(trainer, None, failure)
                return
            with contextlib.ExitStack() as stack:
                try:
                    bystanders = [*objective.bystanders.saved, *(p for p, _ in self._others)]
                    stack.enter_context(untouched(pl_module, objective.device, bystanders, trainer.optimizers))
                    update.complete()
                    # A discriminator's step was made before the generator's, on the generator as it was then.
                    for p, before in self._others:
                        local(p).detach().copy_(before)
                except Exception as error:
                    self._note_failure(error)
                    self.measure(trainer, None, error)
                    return
                window = Window(
                    objective=objective,
                    update=update,
                    records=objective.records,
                    precision=self._precision(trainer),
                    segment=self._segment,
                    averaged=pl_module.automatic_optimization or objective.function is not None,
                )
                self.measure(trainer, window, None)
                objective.bystanders.settle()
        finally:
            self._forget()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the recorder off where the epoch ended before the batch did."""
        self._recording.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Take the recorder off the module."""
        self._recording.close()
        self._forget()
        super().on_exception(trainer, pl_module, exception)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let go of the last window."""
        self._recording.close()
        self._forget()

    def _forget(self) -> None:
        if self._objective is not None:
            self._objective.records = []
        self._update, self._update_step, self._failure = None, -1, None
        self._gradients, self._others, self._differentiated = {}, [], False
        self._loss_scale, self._segment = 1.0, 0

    def _note_failure(self, error: Exception) -> None:
        alone = self._objective is None or self._objective.module.trainer.world_size == 1
        if self.on_error == "raise" and alone:
            raise error
        # Else until the end of the step, also where it is to be raised: other ranks would wait for this one.
        self._failure = error


@torch.no_grad()
def _other_parameters(trainer: pl.Trainer, optimizer: Optimizer) -> list[tuple[Tensor, Tensor]]:
    """What the other optimizers hold, with copies: they may step before the batch ends."""
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    groups = [group for other in trainer.optimizers for group in other.param_groups]
    others = {id(p): p for group in groups for p in group["params"] if id(p) not in own}
    return [(p, local(p).detach().clone()) for p in others.values()]
