"""The part of a monitor that measures on a fixed probe set, before an optimizer step is made."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_curvature.data.probe_set import read_probe_set, step_size
from lightning_curvature.data.reading import sample_count
from lightning_curvature.distributed.failures import agree, noted
from lightning_curvature.losses.fixed import ProbeLoss, ProbeMode
from lightning_curvature.monitors.base import Monitor
from lightning_curvature.monitors.checks import check_count
from lightning_curvature.replay.isolation import untouched
from lightning_curvature.reporting.loggers import warn


class ProbeSetMonitor(Monitor):
    """Base of the monitors that measure on a fixed probe set.

    They measure at θ_t, in ``on_train_batch_start`` of the first batch of optimizer step t, with the learning rate and
    the optimizer's state as the step will find them; their values stand in the logs beside those of the same step. The
    probe set is read once, at the first measured step of a fit
    (see :func:`~lightning_curvature.data.probe_set.read_probe_set`).

    Args:
        probe_samples: the most samples that the probe set has; None for all training data.
        probe_dataloader: a DataLoader, or a list of batches, to take them from; default: the Trainer's.
        micro_batch_size: samples differentiated at once; default: the batch size of the loader.
        probe_mode: "train" leaves the module in its modes, "eval" switches it for the measurement.
        seed: of the choice of samples, of dropout and of random vectors.
        **options: those of :class:`~lightning_curvature.monitors.base.Monitor`.
    """

    _batch_norm_note = "H is that of the mean of micro-batches' losses, each normalized by its own statistics"

    def __init__(
        self,
        *,
        probe_samples: int | None,
        probe_dataloader: Any,
        micro_batch_size: int | None,
        probe_mode: ProbeMode,
        seed: int,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_count("probe_samples", probe_samples, 1, "None takes all training data", optional=True)
        check_count("micro_batch_size", micro_batch_size, 1, "None takes the batch size of the loader", optional=True)
        if probe_mode not in ("train", "eval"):
            raise ValueError(
                f"probe_mode must be 'train' or 'eval', got {probe_mode!r}: 'train' leaves the module as it trains."
            )
        self.probe_samples = probe_samples
        self.probe_dataloader = probe_dataloader
        self.micro_batch_size = micro_batch_size
        self.probe_mode: ProbeMode = probe_mode
        self.seed = seed
        self._probe_set: Any = None
        self._has_read = self._has_measured = False
        self._measured_step = -1

    def prepare(self, trainer: pl.Trainer, loss: ProbeLoss, probe_set: Any) -> tuple[Any, float]:
        """Return what ``measure`` needs, made of what ``_read`` gave, and a number of which it gets the least.

        It may fail on one rank alone, and must not communicate.
        """
        raise NotImplementedError

    def measure(self, trainer: pl.Trainer, prepared: Any, least: float) -> None:
        """Measure at the parameters as they are, and write what it gave. Called on every rank, or on none.

        Args:
            trainer: the Trainer.
            prepared: what ``prepare`` returned.
            least: the least number, on any rank, that it returned beside.
        """
        raise NotImplementedError

    def report_nothing(self, trainer: pl.Trainer) -> None:
        """Write NaN for all values, where the probe set could not be read. Called on every rank."""
        raise NotImplementedError

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check optimizers and parameters, lay out TensorBoard and forget the fit before."""
        super().on_fit_start(trainer, pl_module)
        self._probe_set, self._has_read, self._measured_step = None, False, -1
        self._has_measured = False
        parameters = self._parameters(trainer)
        if not parameters:
            raise MisconfigurationException(
                f"{type(self).__name__} must find trainable parameters in the optimizer, got none: return it from "
                "configure_optimizers."
            )
        self._check_parameters(parameters)
        batch_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in pl_module.modules())
        if batch_norm and self.probe_mode == "train":
            warn(
                f"BatchNorm in training mode couples samples: {self._batch_norm_note}. probe_mode='eval' takes the "
                "running statistics instead."
            )

    def _check_parameters(self, parameters: Sequence[Tensor]) -> None:
        """Raise where the parameters cannot be moved."""
        if any(p.is_complex() for p in parameters):
            raise MisconfigurationException(
                f"{type(self).__name__} must find real parameters, got complex ones: train their real and imaginary "
                "parts."
            )

    def _parameters(self, trainer: pl.Trainer) -> list[Tensor]:
        """The parameters that the followed optimizer moves."""
        groups = trainer.optimizers[self.optimizer_index].param_groups if trainer.optimizers else []
        return [p for group in groups for p in group["params"] if p.requires_grad]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Measure where an optimizer step that is due begins."""
        step = trainer.global_step
        if not self._due(trainer) or step == self._measured_step or self._objective is None:
            return
        if self._complete(trainer, batch, batch_idx):
            self._measure_now(trainer, pl_module, batch)

    def _measure_now(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> None:
        """Measure at the parameters as they are; ``batch`` is that of the coming step, None after the last."""
        assert self._objective is not None
        self._measured_step = trainer.global_step
        objective, begun = self._objective, False
        try:
            with contextlib.ExitStack() as stack:
                # What fails on one rank alone is kept until the others can be told: they are on their way to the next
                # collective, and would wait there.
                errors: list[Exception] = []
                with noted(errors):
                    objective.bystanders.save_all()
                    bystanders = objective.bystanders.saved
                    stack.enter_context(untouched(pl_module, objective.device, bystanders, trainer.optimizers))
                if not self._has_read:
                    self._probe_set, self._has_read = self._read(trainer, batch, errors), True
                prepared: tuple[Any, float] = (None, 0.0)
                if not errors:
                    with noted(errors):
                        objective.bystanders.begin()
                        loss = ProbeLoss(trainer, objective, self._precision(trainer), self.probe_mode)
                        prepared = self.prepare(trainer, loss, self._probe_set)
                least = agree(trainer, errors, "preparing the measurement", prepared[1])
                begun = True
                self.measure(trainer, prepared[0], least)
                self._has_measured = True
                objective.bystanders.settle()
        except Exception as error:
            if isinstance(error, MisconfigurationException) and (self._has_measured or batch is None):
                # What could be measured before, and cannot any more, is no reason to end a run; nothing is, after it.
                error = RuntimeError(str(error))
            self._fail(error)
            if not begun:
                self.report_nothing(trainer)

    def _read(self, trainer: pl.Trainer, batch: Any, errors: list[Exception]) -> Any:
        """Read the data of all measurements of a fit; a rank with errors takes part, and tells the others."""
        return self._read_from(trainer, self.probe_dataloader, batch, errors)

    def _read_from(self, trainer: pl.Trainer, loader: Any, batch: Any, errors: list[Exception]) -> Any:
        """Read from a loader, or where it is None from the Trainer's."""
        size, group = self._cut(trainer, loader), 1
        if self._by_step and not errors:
            with noted(errors):
                size, group = self._step_groups(trainer, batch)
        return read_probe_set(
            trainer,
            loader,
            samples=self.probe_samples,
            batch_size=size,
            group_size=group,
            seed=self.seed,
            errors=errors,
        )

    def _cut(self, trainer: pl.Trainer, loader: Any) -> int | None:
        """Size of a micro-batch; None for that of the loader."""
        return self.micro_batch_size

    def _step_groups(self, trainer: pl.Trainer, batch: Any) -> tuple[int | None, int]:
        """Size of a micro-batch, and how many hold the data of one optimizer step, of all its batches and ranks."""
        loader = self.probe_dataloader if self.probe_dataloader is not None else trainer.train_dataloader
        batches = trainer.accumulate_grad_batches * trainer.world_size
        step = step_size(trainer) or sample_count(batch) * batches
        cut = self.micro_batch_size or getattr(loader, "batch_size", None)
        if cut is None:
            return None, batches
        # The largest part of a step's data that is no larger than asked for, and makes it up exactly.
        size = max(n for n in range(1, min(cut, step) + 1) if step % n == 0)
        return size, step // size

    def _complete(self, trainer: pl.Trainer, batch: Any, batch_idx: int) -> bool:
        """Whether all is there that the measurement of the coming step needs; called for each of its batches."""
        return True

    @property
    def _by_step(self) -> bool:
        """Whether the batches of the probe set are to make up those of optimizer steps."""
        return False

    def _let_go(self) -> None:
        super()._let_go()
        self._probe_set, self._has_read = None, False
