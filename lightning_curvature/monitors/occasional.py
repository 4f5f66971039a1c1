"""The base of the monitors that measure now and then: when fit ends, at named steps, every n steps, or by hand."""

from collections.abc import Sequence

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_curvature.distributed.shards import is_sharded
from lightning_curvature.monitors.options import OccasionalOptions
from lightning_curvature.monitors.probe_set import ProbeSetMonitor, ResultT
from lightning_curvature.monitors.protocol import Problem
from lightning_curvature.reporting.tables import report_values


class OccasionalMonitor(ProbeSetMonitor[Problem, ResultT]):
    """Base of the monitors whose measurement is long, and of a model rather than of a step."""

    options: OccasionalOptions

    def _begin(self) -> None:
        super()._begin()
        self._is_named = False

    @property
    def _is_curve(self) -> bool:
        return bool(self.options.at_steps or self.options.every_n_train_steps)

    def _report(self, trainer: pl.Trainer, result: ResultT | None) -> None:
        """Write a result; that of the only measurement of a fit as a table on TensorBoard, not as curves."""
        super()._report(trainer, result)
        if not self._is_curve and result is not None:
            name = type(self).__name__.removesuffix("Monitor")
            report_values(trainer, f"{self.options.prefix}/{name}", result.values(), result.reasons)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check parameters and module against what is measured."""
        options = self.options
        if not (options.at_end or options.at_steps or options.every_n_train_steps):
            raise MisconfigurationException(
                "at_end, at_steps or every_n_train_steps must say when to measure, got none of them: set at_end=True, "
                "or call evaluate() without a fit."
            )
        super().on_fit_start(trainer, pl_module)
        if not self._is_lazy:
            self.check_module(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read the samples, so that what the data cannot give is said before training and not after it."""
        if trainer.fit_loop.epoch_loop.batch_progress.current.ready:
            return  # resumed within an epoch: a loader that goes on where it was would give the rest of it alone
        try:
            self._data, self._has_read = self._read(trainer, None, None), True
        except Exception as error:
            if self.options.on_error == "raise" or isinstance(error, MisconfigurationException):
                raise
            # It is tried again when there is something to measure.

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the parameters that came out."""
        if self.options.at_end and self._objective is not None and trainer.global_step != self._measured_step:
            self._tally.due += 1
            self._measure_now(trainer, pl_module, None)
        super().on_train_end(trainer, pl_module)

    def _check_parameters(self, parameters: Sequence[Tensor]) -> None:
        super()._check_parameters(parameters)
        if is_sharded(parameters):
            raise MisconfigurationException(
                f"{type(self).__name__} must find whole parameters, got sharded ones, through whose gathering second "
                "derivatives do not reach: train with strategy='ddp', or call evaluate() on a checkpoint."
            )

    def _begins_due(self, trainer: pl.Trainer) -> bool:
        step, asked = trainer.global_step, self._asked_step
        periodic = super()._begins_due(trainer)
        if step != asked:
            # Where a batch makes several steps, the first that begins at or after the named one.
            least = asked if asked >= 0 else step - 1
            self._is_named = any(least < named <= step for named in self.options.at_steps)
        return self._is_named or (periodic and self.options.every_n_train_steps is not None)
