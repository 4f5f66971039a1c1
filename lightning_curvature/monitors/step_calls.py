"""The batches of the coming optimizer step, kept for a measurement before it."""

from typing import Any

import lightning.pytorch as pl

from lightning_curvature.replay.batches import copied
from lightning_curvature.replay.randomness import RandomState

# Batch on the device, ``batch_idx`` and random state of a call of ``training_step``.
StepCall = tuple[Any, int, RandomState]


class StepCalls:
    """The calls of ``training_step`` that are to make the coming step, as far as they are known."""

    def __init__(self) -> None:
        self._step = -1
        self._calls: list[StepCall] = []
        self._failure: Exception | None = None

    def add(self, trainer: pl.Trainer, batch: Any, batch_idx: int) -> bool:
        """Keep a copy of a batch that is about to be passed, and return whether it is the last of its step."""
        if self._step != trainer.global_step:
            self._calls, self._failure, self._step = [], None, trainer.global_step
        try:
            # A copy, as a step may write into its batch.
            self._calls.append((copied(batch), batch_idx, RandomState(trainer.strategy.root_device)))
        except Exception as error:
            self._failure = error.with_traceback(None)  # the other ranks learn of it when all prepare
        last = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        return last or (batch_idx + 1) % trainer.accumulate_grad_batches == 0

    def __len__(self) -> int:
        """Return how many are kept."""
        return len(self._calls)

    def take(self) -> list[StepCall]:
        """Return the calls, once; raise where one could not be kept."""
        calls, failure = self._calls, self._failure
        self.forget()
        if failure is not None:
            raise failure
        return calls

    def forget(self) -> None:
        """Let go of them."""
        self._calls, self._failure = [], None
