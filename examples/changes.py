"""Hyperparameters that change during training."""

import argparse
from dataclasses import dataclass, replace
from typing import Any

import lightning.pytorch as pl
from data import MiniBatchData
from plotting_sharpness import Phase


@dataclass(frozen=True)
class Change:
    """A new value of a hyperparameter, from a step on.

    Attributes:
        name: "lr" or "batch_size".
        value: the new value.
        step: first step that can have it.
    """

    name: str
    value: float
    step: int

    @classmethod
    def parse(cls, text: str) -> "Change":
        """Read ``name=value@step``."""
        name, _, rest = text.partition("=")
        value, _, step = rest.partition("@")
        try:
            change = cls(name, {"lr": float, "batch_size": int}[name](value), int(step))
        except (KeyError, ValueError):
            raise argparse.ArgumentTypeError(
                f"must be lr=VALUE@STEP or batch_size=VALUE@STEP, got {text!r}: for example lr=0.8@5000"
            ) from None
        if change.value <= 0:
            raise argparse.ArgumentTypeError(f"must have a value above 0, got {text!r}")
        return change


class Changes(pl.Callback):
    """Changes η at the given steps, and the batch size at the beginning of the next epoch.

    Place it before the monitors, so that they measure with the values that the step uses.

    Args:
        changes: the changes.
        data: the datamodule whose batch size changes.
        phases: the phases of the run so far; each change begins a new one.
    """

    def __init__(self, changes: list[Change], data: MiniBatchData, phases: list[Phase]) -> None:
        self.waiting = sorted(changes, key=lambda change: change.step)
        self.data = data
        self.phases = phases

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Set η of all groups."""
        for change in self._due("lr", trainer.global_step):
            for group in trainer.optimizers[0].param_groups:
                group["lr"] = change.value
            self._begin(trainer.global_step, learning_rate=change.value)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set the batch size of the next loader, unless training ends here."""
        if trainer.global_step < trainer.max_steps:
            for change in self._due("batch_size", trainer.global_step):
                self.data.batch_size = int(change.value)
                self._begin(trainer.global_step, batch_size=int(change.value))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the changes that were not made."""
        for change in self.waiting:
            print(f"{change.name}={change.value:g}@{change.step}: not made, no epoch began from then on", flush=True)

    def _due(self, name: str, step: int) -> list[Change]:
        due = [change for change in self.waiting if change.name == name and change.step <= step]
        self.waiting = [change for change in self.waiting if change not in due]
        return due

    def _begin(self, step: int, **changed: Any) -> None:
        before = self.phases[-1]
        begun = replace(before, start=step, **changed)
        # Both may change at one step.
        self.phases[-1 if before.start == step else len(self.phases) :] = [begun]
        print(f"step {step}: {begun.change_from(before)}", flush=True)
