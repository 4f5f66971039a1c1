"""Hyperparameters that change on the way."""

import argparse
from dataclasses import dataclass, replace
from typing import Any

import lightning.pytorch as pl
from data import MiniBatchData
from plotting_sharpness import Phase


@dataclass(frozen=True)
class Change:
    """A hyperparameter that gets another value on the way.

    Attributes:
        name: "lr" or "batch_size".
        value: from then on.
        step: first step that may have it.
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
    """Makes changes of η at their steps, and of the batch size where the next epoch begins.

    To stand before the monitors, which then measure with what the step will use.

    Args:
        changes: what to change.
        data: the datamodule whose batch size they change.
        phases: the run up to now; each change begins a new one.
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
        """Set the batch size of the loader that the Trainer asks for next, unless training ends here."""
        if trainer.global_step < trainer.max_steps:
            for change in self._due("batch_size", trainer.global_step):
                self.data.batch_size = int(change.value)
                self._begin(trainer.global_step, batch_size=int(change.value))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say which changes were not made."""
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
