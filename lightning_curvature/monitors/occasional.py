"""The part of a monitor that measures now and then: when fit ends, at named steps, every n steps, or by hand."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import Dataset

from lightning_curvature.distributed.failures import agree, noted
from lightning_curvature.distributed.shards import is_sharded
from lightning_curvature.losses.fixed import ProbeLoss
from lightning_curvature.monitors.checks import check_not_quantized, check_numbers
from lightning_curvature.monitors.probe_set import ProbeSetMonitor
from lightning_curvature.replay.isolation import attached, untouched
from lightning_curvature.replay.objective import StepObjective

Result = TypeVar("Result")


class OccasionalMonitor(ProbeSetMonitor, Generic[Result]):
    """Base of the monitors whose measurement is long, and of a model rather than of a step.

    Args:
        at_end: measure when fit ends.
        at_steps: measure before these optimizer steps.
        every_n_train_steps: measure before steps 0, n, 2n, …; None for not.
        **options: those of :class:`~lightning_curvature.monitors.probe_set.ProbeSetMonitor`.

    Attributes:
        result: what the last measurement gave, or None.
    """

    def __init__(
        self, *, at_end: bool, at_steps: Sequence[int], every_n_train_steps: int | None, **options: Any
    ) -> None:
        super().__init__(every_n_train_steps=1 if every_n_train_steps is None else every_n_train_steps, **options)
        steps = check_numbers(
            "at_steps", at_steps, "(0, 100) measures before the first step and before step 100", least=0
        )
        self.at_end, self.at_steps = at_end, frozenset(steps)
        self._periodic, self._is_named = every_n_train_steps is not None, False
        self.result: Result | None = None

    def measured(self, trainer: pl.Trainer, prepared: Any, least: float) -> Result:
        """Measure at the parameters as they are, and return what it gave; nothing is written.

        Args:
            trainer: see :meth:`measure`.
            prepared: see :meth:`measure`.
            least: see :meth:`measure`.
        """
        raise NotImplementedError

    def report_result(self, trainer: pl.Trainer, result: Result) -> None:
        """Write what a measurement gave."""
        raise NotImplementedError

    def check_module(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Raise where the module cannot give what is measured."""

    def evaluate(self, module: pl.LightningModule, dataloader: Any = None, trainer: pl.Trainer | None = None) -> Result:
        """Measure a module as it is, a checkpoint for example, without a fit; nothing is logged.

        The module comes back as it was, on the device where it was.

        Args:
            module: the module; all its parameters that require gradients count as trained.
            dataloader: a DataLoader with the samples; default: ``probe_dataloader``.
            trainer: gives device and precision; default: a Trainer on the device that Lightning finds.

        Returns:
            What the measurement gave, also in ``result``.

        Raises:
            MisconfigurationException: for what the module or the data cannot give.
        """
        loader = self.probe_dataloader if dataloader is None else dataloader
        _check_by_hand(module, loader)
        trainer = trainer or _quiet_trainer()
        check_not_quantized(type(self).__name__, module)
        parameters = [p for p in module.parameters() if p.requires_grad]
        if not parameters:
            raise MisconfigurationException(
                "module must have parameters that require gradients, got none: call module.unfreeze(), or "
                "requires_grad_() on those that shall be moved."
            )
        self._check_parameters(parameters)
        with torch.inference_mode(False), attached(trainer, module, parameters):
            self.check_module(trainer, module)
            objective = StepObjective(module, trainer.strategy.root_device, None, self.objective_function)
            objective.bystanders.save_all()
            with untouched(module, objective.device, objective.bystanders.saved, trainer.optimizers):
                probe_set, errors = self._read_from(trainer, loader, None, []), list[Exception]()
                prepared: tuple[Any, float] = (None, 0.0)
                with noted(errors):
                    objective.bystanders.begin()
                    loss = ProbeLoss(trainer, objective, self._precision(trainer), self.probe_mode)
                    prepared = self.prepare(trainer, loss, probe_set)
                least = agree(trainer, errors, "preparing the measurement", prepared[1])
                self.result = self.measured(trainer, prepared[0], least)
        return self.result

    def measure(self, trainer: pl.Trainer, prepared: Any, least: float) -> None:
        """Measure at the parameters as they are and write what it gave; ``prepared`` ends with a ``Progress``."""
        try:
            self.result = self.measured(trainer, prepared, least)
        except Exception:
            self.report_nothing(trainer)
            raise
        if not self._has_measured:
            prepared[-1].tell()
        self.report_result(trainer, self.result)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check parameters and module against what is measured."""
        if not (self.at_end or self.at_steps or self._periodic):
            raise MisconfigurationException(
                "at_end, at_steps or every_n_train_steps must say when to measure, got none of them: set at_end=True, "
                "or call evaluate() without a fit."
            )
        super().on_fit_start(trainer, pl_module)
        self.check_module(trainer, pl_module)
        self.result, self._is_named = None, False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read the samples, so that what the data cannot give is said before training and not after it."""
        if trainer.fit_loop.epoch_loop.batch_progress.current.ready:
            return  # resumed within an epoch: a loader that goes on where it was would give the rest of it alone
        try:
            self._probe_set, self._has_read = self._read(trainer, None, []), True
        except Exception as error:
            if self.on_error == "raise" or isinstance(error, MisconfigurationException):
                raise
            # It is tried again when there is something to measure.

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the parameters that came out."""
        if self.at_end and self._objective is not None and trainer.global_step != self._measured_step:
            self._measure_now(trainer, pl_module, None)

    def _check_parameters(self, parameters: Sequence[Tensor]) -> None:
        super()._check_parameters(parameters)
        if is_sharded(parameters):
            raise MisconfigurationException(
                f"{type(self).__name__} must find whole parameters, got sharded ones, through whose gathering second "
                "derivatives do not reach: train with strategy='ddp', or call evaluate() on a checkpoint."
            )

    def _parameters(self, trainer: pl.Trainer) -> list[Tensor]:
        # By hand there is one optimizer, of all parameters.
        index = self.optimizer_index if len(trainer.optimizers) > self.optimizer_index else 0
        groups = trainer.optimizers[index].param_groups if trainer.optimizers else []
        return [p for group in groups for p in group["params"] if p.requires_grad]

    def _due(self, trainer: pl.Trainer) -> bool:
        step, asked = trainer.global_step, self._asked_step
        periodic = super()._due(trainer)
        if step != asked:
            # Where a batch makes several steps, the first that begins at or after the named one.
            least = asked if asked >= 0 else step - 1
            self._is_named = any(least < named <= step for named in self.at_steps)
        return self._objective is not None and (self._is_named or (periodic and self._periodic))


def _quiet_trainer() -> pl.Trainer:
    """A Trainer on the device that Lightning finds, which does not tell of it: there may be one for each checkpoint."""
    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        return pl.Trainer(
            devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
        )
    finally:
        log.setLevel(level)


def _check_by_hand(module: object, loader: object) -> None:
    """Raise unless a module and a loader are what ``evaluate`` needs."""
    if not isinstance(module, pl.LightningModule):
        raise MisconfigurationException(
            f"module must be a LightningModule, whose training_step gives the loss, got a {type(module).__name__}: "
            "wrap the network in one, or load the checkpoint by load_from_checkpoint."
        )
    if isinstance(loader, Dataset):
        raise MisconfigurationException(
            f"dataloader must be a DataLoader, got a {type(loader).__name__}: wrap it, DataLoader(dataset)."
        )
    if loader is None:
        raise MisconfigurationException(
            "dataloader must be given where there is no Trainer's, got None: give a DataLoader of single samples."
        )
