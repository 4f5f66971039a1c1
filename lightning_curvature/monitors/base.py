"""What all monitors have in common: when they measure, on which optimizer, under which prefix, and what errors do."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Generator, Iterable, Mapping
from typing import Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_curvature.losses.fixed import Precision
from lightning_curvature.monitors.checks import check_count, check_not_quantized
from lightning_curvature.monitors.strategies import check_strategy
from lightning_curvature.replay.objective import ObjectiveFunction, StepObjective
from lightning_curvature.reporting.loggers import add_layout, report, warn

OnError = Literal["warn", "raise"]


class Monitor(pl.Callback):
    """Base of all monitors.

    Args:
        every_n_train_steps: measure optimizer steps 0, n, 2n, …
        objective: see :class:`~lightning_curvature.replay.objective.StepObjective`.
        outputs: see :class:`~lightning_curvature.replay.objective.StepObjective`.
        optimizer_index: which optimizer to follow where the module has several.
        prefix: prefix of the keys.
        probe_precision: "32-true" probes without autocast, None in the precision of the run.
        on_error: "warn" logs NaN and warns once when a measurement fails, "raise" lets the error through.
    """

    def __init__(
        self,
        *,
        every_n_train_steps: int,
        objective: ObjectiveFunction | None,
        outputs: str | None,
        optimizer_index: int,
        prefix: str = "curvature",
        probe_precision: Literal["32-true"] | None = None,
        on_error: OnError,
    ) -> None:
        check_count("every_n_train_steps", every_n_train_steps, 1, "1 measures every optimizer step")
        if on_error not in ("warn", "raise"):
            raise ValueError(f"on_error must be 'warn' or 'raise', got {on_error!r}: 'warn' lets training go on.")
        if not isinstance(optimizer_index, int) or optimizer_index < 0:
            raise ValueError(
                f"optimizer_index must not be negative, got {optimizer_index!r}: 0 is the first optimizer."
            )
        if not prefix or prefix != prefix.strip("/"):
            raise ValueError(f"prefix must be a name without slashes at its ends, got {prefix!r}: use 'curvature'.")
        if probe_precision not in (None, "32-true"):
            raise ValueError(
                f"probe_precision must be '32-true' or None, got {probe_precision!r}: None probes in the run's "
                "precision."
            )
        self.every_n_train_steps = every_n_train_steps
        self.objective_function = objective
        self.outputs = outputs
        self.optimizer_index = optimizer_index
        self.prefix = prefix
        self.probe_precision = probe_precision
        self.on_error: OnError = on_error
        self._objective: StepObjective | None = None
        self._asked_step, self._is_due = -1, False

    @property
    def state_key(self) -> str:
        """Distinct for monitors with distinct prefixes."""
        return self._generate_state_key(prefix=self.prefix)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check that no other monitor writes the same keys, and what can be checked before optimizers exist."""
        if stage == "fit":
            check_strategy(trainer, pl_module, type(self).__name__)
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if other is not self and type(other) is type(self) and other.prefix == self.prefix:
                raise MisconfigurationException(
                    f"prefix must differ between monitors of one class, got {self.prefix!r} of two "
                    f"{type(self).__name__}s: give one of them another prefix."
                )
        if stage != "fit" or self.objective_function is not None:
            return
        if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
            raise MisconfigurationException(
                f"{type(self).__name__} must see the batch of a step, got training_step(dataloader_iter): take "
                "(batch, batch_idx) instead."
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check module and optimizers, and the parameters as the strategy has left them, and lay out TensorBoard."""
        check_not_quantized(type(self).__name__, pl_module)
        check_strategy(trainer, pl_module, type(self).__name__)
        count = len(trainer.optimizers)
        if count > 1 and self.objective_function is None:
            raise MisconfigurationException(
                f"{type(self).__name__} needs objective= where several optimizers have losses of their own, got "
                f"{count} optimizers: give a callable (module, batch) -> loss, and optimizer_index= for the optimizer "
                "it belongs to."
            )
        if count and self.optimizer_index >= count:
            raise MisconfigurationException(
                f"optimizer_index must be below the number of optimizers, got {self.optimizer_index} of {count}: "
                "count from 0."
            )
        self._asked_step = -1
        device = trainer.strategy.root_device
        self._objective = StepObjective(pl_module, device, self.outputs, self.objective_function)
        add_layout(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let go of the module."""
        self._let_go()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Let go of the module: Lightning does not come to ``teardown`` after an error."""
        self._let_go()

    def _let_go(self) -> None:
        self._objective = None
        # Methods of the module, which Lightning gives to callbacks at the start of every run.
        for name in ("log", "log_dict"):
            vars(self).pop(name, None)

    def _due(self, trainer: pl.Trainer) -> bool:
        """Whether the step that a batch begins is to be measured; to be asked at the start of every batch.

        In manual optimization a batch may make several steps: then the first that begins at or after 0, n, 2n, …
        """
        step, every = trainer.global_step, self.every_n_train_steps
        if step != self._asked_step:
            passed = 0 <= self._asked_step < step - step % every
            self._asked_step, self._is_due = step, passed or step % every == 0
        return self._objective is not None and self._is_due

    def _precision(self, trainer: pl.Trainer) -> Precision:
        """What makes the context of a probe's forward."""
        of_step = trainer.precision_plugin.train_step_context
        if self.probe_precision is None:
            return of_step

        @contextlib.contextmanager
        def without_autocast() -> Generator[None, None, None]:
            with of_step(), torch.autocast(trainer.strategy.root_device.type, enabled=False):
                yield

        return without_autocast

    def _write(self, trainer: pl.Trainer, values: Mapping[str, float], shown: Iterable[str] = ()) -> None:
        """Write values under the prefix, and show some of them on the progress bar."""
        report(
            trainer,
            {f"{self.prefix}/{key}": value for key, value in values.items()},
            [f"{self.prefix}/{key}" for key in shown],
        )

    def _fail(self, error: Exception) -> None:
        """Handle a failed measurement as ``on_error`` says."""
        if self.on_error == "raise" or isinstance(error, MisconfigurationException):
            raise error
        warn(f"{type(self).__name__} logs NaN: {type(error).__name__}: {error}", any_rank=True)
