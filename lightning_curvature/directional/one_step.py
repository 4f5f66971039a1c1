"""One step of training, made for a monitor to measure, and undone."""

import contextlib
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn

from lightning_curvature.operators.differentiation import patched, put_back_at_exit
from lightning_curvature.replay.isolation import silent, without_gradients
from lightning_curvature.replay.randomness import RandomState
from lightning_curvature.replay.snapshot import restored


def step_once(trainer: pl.Trainer, module: pl.LightningModule, batch: Any, monitor: Any) -> None:
    """Make the step of a batch as Lightning's loop does, with the hooks of a monitor, and put everything back.

    Of the module's own hooks those of a batch are called, from ``on_train_batch_start`` to the optimizer's; it logs
    nowhere.

    Args:
        trainer: a new Trainer that holds the module.
        module: the module; it and its optimizers are restored with all that is within their reach, also after an error.
        batch: on the device.
        monitor: an :class:`~.directional.update_monitor.UpdateMonitor` between two fits.
    """
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    with contextlib.ExitStack() as stack:
        put_back_at_exit(stack, RandomState(trainer.strategy.root_device).restore)
        stack.enter_context(restored([module, *trainer.optimizers, *schedulers]))
        stack.enter_context(without_gradients(list(module.parameters())))
        for part in module.modules():
            if isinstance(part, pl.LightningModule):
                stack.enter_context(patched(part, log=silent, log_dict=silent, print=silent))
        stack.enter_context(torch.enable_grad())
        trainer.callbacks = [monitor]  # type: ignore[attr-defined]
        trainer.state.fn, trainer.training = TrainerFn.FITTING, True
        stack.callback(monitor.teardown, trainer, module, "fit")
        monitor.setup(trainer, module, "fit")
        monitor.on_fit_start(trainer, module)
        monitor.on_train_batch_start(trainer, module, batch, 0)
        outputs = None if module.on_train_batch_start(batch, 0) == -1 else _run(trainer, module, batch)
        monitor.on_train_batch_end(trainer, module, outputs, batch, 0)


def _run(trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> Any:
    """Run the training step, and the optimizer's in automatic optimization."""
    loop = trainer.fit_loop.epoch_loop
    loop.batch_progress.increment_ready()
    arguments = loop._build_kwargs({}, batch, 0)  # type: ignore[arg-type]
    if module.automatic_optimization:
        return loop.automatic_optimization.run(trainer.optimizers[0], 0, arguments)  # type: ignore[arg-type]
    return loop.manual_optimization.run(arguments)  # type: ignore[arg-type]
