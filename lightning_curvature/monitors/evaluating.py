"""What every monitor can measure without a fit: a module as it is, on given data."""

import contextlib
import copy
from collections.abc import Generator, Mapping
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_curvature.data.first import first_batch
from lightning_curvature.losses.fixed import Precision, ProbeLoss
from lightning_curvature.monitors.by_hand import Optimizers, check_by_hand, check_parameters, quiet_trainer
from lightning_curvature.monitors.cost import Cost, forward_backward
from lightning_curvature.monitors.evaluation import Evaluation
from lightning_curvature.monitors.options import ProbeSetOptions
from lightning_curvature.monitors.price import now
from lightning_curvature.monitors.protocol import Result
from lightning_curvature.monitors.reporter import Reporter
from lightning_curvature.replay.isolation import attached
from lightning_curvature.replay.objective import StepObjective


class Evaluating(Reporter):
    """Base of all monitors, as far as they measure by hand."""

    def evaluate(
        self,
        module: pl.LightningModule,
        dataloader: Any = None,
        optimizer: Any = None,
        *,
        trainer: pl.Trainer | None = None,
    ) -> Evaluation:
        """Measure a module as it is, a checkpoint for example, without a fit; nothing is logged.

        Module, optimizer, random states and dataloader come back bit for bit, also after an error, and so does the
        monitor. The module is measured in its modes, as ``probe_mode`` says.

        Args:
            module: the module, before or after a fit.
            dataloader: a DataLoader, or batches that can be read repeatedly; default: ``probe_dataloader``.
            optimizer: the optimizer, for thresholds, preconditioners and steps; one that a fit has left is
                ``trainer.optimizers[0]``. Default: a new one by ``configure_optimizers``, if that works without a
                running Trainer; else all parameters that require gradients count as trained, and there are no edges.
            trainer: gives device, precision and clipping; default: a Trainer without trimmings on the module's device,
                or for a module on the CPU on the device that Lightning finds.

        Raises:
            MisconfigurationException: for what the module, the data or the optimizer cannot give.
            Exception: why nothing could be measured; where a part fails it is NaN with a reason, or raises, as
                ``on_error`` says.
        """
        dataloader = self._checked(module, dataloader)
        return self.evaluate_with(module, dataloader, Optimizers.of(module, optimizer), trainer)

    def _checked(self, module: pl.LightningModule, dataloader: Any) -> Any:
        """Return the loader that a measurement by hand reads, or raise for what cannot be measured."""
        self.check_at_a_point()
        if dataloader is None and isinstance(self.options, ProbeSetOptions):
            dataloader = self.options.probe_dataloader
        check_by_hand(type(self).__name__, module, dataloader)
        return dataloader

    def check_at_a_point(self) -> None:
        """Raise where what is measured has no value at one point."""

    def evaluate_with(
        self, module: pl.LightningModule, dataloader: Any, optimizers: Optimizers, trainer: pl.Trainer | None
    ) -> Evaluation:
        """Evaluate with optimizers that were made; arguments are checked."""
        with self._held(module, dataloader, optimizers, trainer) as (one, holder):
            result = one._by_hand(holder, module, dataloader)
            numbers, edges = result.values(), one.edges(holder)
            if not optimizers.all:
                if edges:
                    optimizers.tell()
                return Evaluation.of(result, numbers, {})
            return Evaluation.of(result, numbers | one.beside(holder, numbers), edges)

    def cost(
        self,
        module: pl.LightningModule,
        dataloader: Any,
        optimizer: Any = None,
        *,
        trainer: pl.Trainer | None = None,
    ) -> Cost:
        """Measure by hand, and return what a measurement costs, in seconds and in forward+backwards of a batch.

        It is timed by the clock, on a machine that shall do nothing else, after the data have been read and a first
        measurement has warmed up. Arguments and errors are those of :meth:`evaluate`, and nothing is changed either.
        """
        dataloader = self._checked(module, dataloader)
        with self._held(module, dataloader, Optimizers.of(module, optimizer), trainer) as (one, holder):
            seconds = one._seconds_by_hand(holder, module, dataloader)
            objective = StepObjective(module, holder.strategy.root_device, None, one.options.objective)
            with first_batch(holder, dataloader) as batch, objective.untouched():
                loss = ProbeLoss(holder, objective, one._precision(holder), "train")
                return Cost(seconds, forward_backward(holder, loss, batch, one._parameters(holder)))

    @contextlib.contextmanager
    def _held(
        self, module: pl.LightningModule, dataloader: Any, optimizers: Optimizers, trainer: pl.Trainer | None
    ) -> Generator[tuple["Evaluating", pl.Trainer], None, None]:
        """Yield a copy of the monitor, between two fits, and a Trainer that holds the module inside the block."""
        check_parameters(optimizers.parameters_of(module))
        one = copy.copy(self)
        one.options = one.options.at_a_point()
        if optimizers.given or not optimizers.all:
            one.options = replace(one.options, optimizer_index=0)
        if isinstance(one.options, ProbeSetOptions):
            one.options = replace(one.options, probe_dataloader=dataloader)
        one._begin()
        one._start_afresh()
        trainer = one._trainer_by_hand(module, trainer)
        with (
            torch.inference_mode(False),
            attached(trainer, module, optimizers.held(module), optimizers.schedulers),
        ):
            one._check_optimizer_index(trainer)
            one._check_optimizers(optimizers)
            yield one, trainer

    def _trainer_by_hand(self, module: pl.LightningModule, trainer: pl.Trainer | None) -> pl.Trainer:
        """Return the Trainer that holds the module in an evaluation; one that runs must not notice."""
        return trainer or quiet_trainer(module)

    def _check_optimizers(self, optimizers: Optimizers) -> None:
        """Raise where an evaluation needs an optimizer that it does not have."""

    def _by_hand(self, trainer: pl.Trainer, module: pl.LightningModule, dataloader: Any) -> Result:
        """Measure a module that a Trainer holds, and put it back."""
        raise NotImplementedError

    def _seconds_by_hand(self, trainer: pl.Trainer, module: pl.LightningModule, dataloader: Any) -> float:
        """Measure by hand, and return the seconds that a fit would spend on it."""
        self._by_hand(trainer, module, dataloader)
        self._start_afresh()
        start = now(trainer.strategy.root_device)
        self._by_hand(trainer, module, dataloader)
        return now(trainer.strategy.root_device) - start

    def beside(self, trainer: pl.Trainer, values: Mapping[str, float]) -> dict[str, float]:
        """Return the values that need no measurement, such as thresholds as they are now, or make do with others."""
        return {}

    def _begin(self) -> None:
        raise NotImplementedError

    def _start_afresh(self) -> None:
        raise NotImplementedError

    def _precision(self, trainer: pl.Trainer) -> Precision:
        raise NotImplementedError

    def _check_optimizer_index(self, trainer: pl.Trainer) -> None:
        raise NotImplementedError
