"""What a measurement without a fit needs: a module, data, optimizers, and a Trainer that holds them."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.core.optimizer import (
    LightningOptimizer,
    _configure_optimizers,
    _configure_schedulers_automatic_opt,
    _configure_schedulers_manual_opt,
)
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lightning_curvature.data.loaders import check_dataloader
from lightning_curvature.distributed.shards import is_sharded
from lightning_curvature.monitors.checks import check_not_quantized, is_lazy
from lightning_curvature.replay.randomness import RandomState
from lightning_curvature.replay.snapshot import restored
from lightning_curvature.reporting.loggers import inform


@dataclass(frozen=True)
class Optimizers:
    """The optimizers of an evaluation.

    Attributes:
        all: those of the module, none where it has none.
        schedulers: their ``LRSchedulerConfig``.
        missing: why there is none.
        given: whether it is the one that the caller gave.
    """

    all: Sequence[Any]
    schedulers: Sequence[Any] = ()
    missing: str = ""
    given: bool = False

    @classmethod
    def of(cls, module: pl.LightningModule, optimizer: Any) -> "Optimizers":
        """Return the given optimizer, or those that ``configure_optimizers`` makes without a running Trainer."""
        if optimizer is not None:
            bare = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
            _check_optimizer(module, bare)
            return cls([bare], _schedulers_of(module, bare), given=True)
        if not is_overridden("configure_optimizers", module):
            return cls([], missing="the module has no configure_optimizers")
        random = RandomState(module.device)
        try:
            with restored([module]):
                made, schedulers, monitor = _configure_optimizers(module.configure_optimizers() or [])  # type: ignore[arg-type]
                automatic = module.automatic_optimization
                configs = (
                    _configure_schedulers_automatic_opt(schedulers, monitor)
                    if automatic
                    else _configure_schedulers_manual_opt(schedulers)
                )
            return cls(made, configs, "" if made else "configure_optimizers returned none")
        except Exception as error:
            return cls([], missing=f"configure_optimizers failed: {type(error).__name__}: {error}".rstrip("."))
        finally:
            random.restore()

    def parameters_of(self, module: pl.LightningModule) -> list[Tensor]:
        """Return the parameters that are trained: without an optimizer all that require gradients."""
        groups = [group for optimizer in self.all for group in optimizer.param_groups]
        held = [p for group in groups for p in group["params"]] if self.all else list(module.parameters())
        return [p for p in held if p.requires_grad]

    def held(self, module: pl.LightningModule) -> Sequence[Any]:
        """Return them; where there is none one that makes no step, and says what is trained."""
        return self.all or [torch.optim.SGD(self.parameters_of(module), lr=0.0)]

    def check(self, quantities: Sequence[str], need: Sequence[str]) -> None:
        """Raise where a quantity needs an optimizer and there is none."""
        lacking = [name for name in quantities if name in need]
        if self.missing and lacking:
            raise MisconfigurationException(
                f"optimizer must be given for {lacking}, got none, and {self.missing}: give the optimizer, or leave "
                "these out."
            )

    def tell(self) -> None:
        """Log why there are no edges."""
        if self.missing:
            inform(f"no edges of stability: {self.missing}; give optimizer= for them.")


def _schedulers_of(module: pl.LightningModule, optimizer: Any) -> list[Any]:
    """Return those that the Trainer of the module has for an optimizer: a step made by hand may ask for them."""
    configs = getattr(module._trainer, "lr_scheduler_configs", ())
    return [config for config in configs if getattr(config.scheduler, "optimizer", None) is optimizer]


def _check_optimizer(module: pl.LightningModule, optimizer: Any) -> None:
    groups = getattr(optimizer, "param_groups", None)
    if not isinstance(groups, list):
        raise MisconfigurationException(
            f"optimizer must be an optimizer of the module, got a {type(optimizer).__name__}: give one such as "
            "torch.optim.SGD(module.parameters(), lr=0.1), or None for that of configure_optimizers."
        )
    own = {id(p) for p in module.parameters()}
    if not any(id(p) in own for group in groups for p in group["params"]):
        raise MisconfigurationException(
            f"optimizer must move parameters of the module, got a {type(optimizer).__name__} of other tensors: make it "
            "of module.parameters()."
        )


def check_by_hand(monitor: str, module: object, loader: object) -> None:
    """Raise unless a module and a loader are what ``evaluate`` needs."""
    if not isinstance(module, pl.LightningModule):
        raise MisconfigurationException(
            f"module must be a LightningModule, whose training_step gives the loss, got a {type(module).__name__}: "
            "wrap the network in one, or load the checkpoint by load_from_checkpoint."
        )
    check_dataloader("dataloader", loader, MisconfigurationException)
    if loader is None:
        raise MisconfigurationException(
            "dataloader must be given where there is no Trainer's, got None: give a DataLoader of single samples."
        )
    check_not_quantized(monitor, module)
    if is_lazy(module):
        raise MisconfigurationException(
            "module must have parameters of known shapes, got lazy ones: call its forward once on a batch."
        )


def check_parameters(parameters: Sequence[Tensor]) -> None:
    """Raise unless there are parameters to differentiate by, and whole ones."""
    if not parameters:
        raise MisconfigurationException(
            "module must have parameters that require gradients, got none: call module.unfreeze(), or "
            "requires_grad_() on those that shall be moved."
        )
    if is_sharded(parameters):
        raise MisconfigurationException(
            "module must have whole parameters for evaluate(), got sharded ones: load the checkpoint into a module of "
            "one process."
        )


def quiet_trainer(module: pl.LightningModule, like: pl.Trainer | None = None) -> pl.Trainer:
    """Return a Trainer that writes and shows nothing, on the module's device, or on what Lightning finds for a CPU's.

    ``like`` gives device, precision, clipping, and the numbers of steps and epochs.
    """
    device = module.device if like is None else like.strategy.root_device
    options: dict[str, Any] = {"devices": 1 if device.index is None or device.type == "cpu" else [device.index]}
    if like is not None or device.type != "cpu":
        options["accelerator"] = device.type
    if like is not None:
        options |= {"precision": like.precision, "gradient_clip_val": like.gradient_clip_val}
        options["gradient_clip_algorithm"] = like.gradient_clip_algorithm
    shown = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    options |= dict.fromkeys(shown, False)
    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = log.level
    log.setLevel(logging.WARNING)  # without its log lines: there may be many checkpoints
    try:
        trainer = pl.Trainer(**options)
    finally:
        log.setLevel(level)
    if like is not None:
        set_progress(trainer, like.global_step, like.current_epoch)
    return trainer


def set_progress(trainer: pl.Trainer, step: int, epoch: int) -> None:
    """Let a Trainer that does not run count so many optimizer steps and epochs: losses and seeds may go by them."""
    loop = trainer.fit_loop.epoch_loop
    loop.automatic_optimization.optim_progress.optimizer.step.total.completed = step
    loop.manual_optimization.optim_step_progress.total.completed = step
    trainer.fit_loop.epoch_progress.current.completed = epoch
