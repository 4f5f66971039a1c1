"""The loss of fixed micro-batches as a function of the parameters: the training step, repeated."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import lightning.pytorch as pl
from torch import Tensor

from lightning_curvature.data.copies import DataRandomness
from lightning_curvature.data.probe_set import ProbeBatch, ProbeSet, to_device
from lightning_curvature.losses.stacked import Stacked, stack, stacked_losses
from lightning_curvature.operators import MicroBatch
from lightning_curvature.operators.differentiation import differentiable, same_attention
from lightning_curvature.operators.micro_batches import Evaluation
from lightning_curvature.replay.module_state import ModuleState, RandomState
from lightning_curvature.replay.objective import RecordedBatch, StepObjective

ProbeMode = Literal["train", "eval"]
Precision = Callable[[], contextlib.AbstractContextManager[object]]


class ProbeLoss:
    """Repeats the training step on batches that were read, each time from the same states.

    Random numbers are those that follow from the seed of each batch: dropout has one mask for a batch, in every product
    and at every measured step. In "train" mode BatchNorm normalizes each micro-batch by its own statistics; in "eval"
    mode by the running ones, which are constants.

    Make and use it inside :func:`~.replay.isolation.untouched`.

    Args:
        trainer: the Trainer.
        objective: the training step.
        precision: makes the context of a forward.
        mode: "train" leaves the module as it trains, "eval" switches it.
    """

    def __init__(self, trainer: pl.Trainer, objective: StepObjective, precision: Precision, mode: ProbeMode) -> None:
        self._trainer, self._objective, self._precision = trainer, objective, precision
        if mode == "eval":
            objective.module.eval()
        self._state = ModuleState(objective.module, objective.bystanders.saved)

    def parts(self, probe_set: ProbeSet) -> list[MicroBatch]:
        """This rank's micro-batches of a set that ranks share.

        As many on every rank: a forward may communicate (a step that gathers, sharded parameters). Where there are too
        few, the last is repeated with weight 0.
        """
        parts = self.parts_of(probe_set.batches, probe_set.total)
        return parts + [replace(parts[-1], weight=0.0)] * (probe_set.rounds - len(parts))

    def parts_of(self, batches: Sequence[ProbeBatch], total: int) -> list[MicroBatch]:
        """Micro-batches, each weighted by its share of ``total`` samples."""
        return [
            MicroBatch(functools.partial(self.evaluate, probe, index), probe.size / total)
            for index, probe in enumerate(batches)
        ]

    def evaluate(self, probe: ProbeBatch, index: int) -> Evaluation:
        """Loss and outputs of one micro-batch at the parameters as they are now; ``index`` is its ``batch_idx``."""
        (batch,) = self.moved([probe])
        return self._repeat(batch, index, self._seeded(probe.seed))

    def parts_of_many(
        self, draws: Sequence[Sequence[ProbeBatch]], parameters: Sequence[Tensor], copies: Sequence[Tensor]
    ) -> list[MicroBatch]:
        """Micro-batches of several mini-batches at once, each at its own copy of the parameters.

        Args:
            draws: micro-batches of each mini-batch, as many and as large in all of them.
            parameters: those that have copies.
            copies: of each, (mini-batches, shape).

        Raises:
            ValueError: if they are not alike.
        """
        sizes = [[probe.size for probe in draw] for draw in draws]
        if any(one != sizes[0] for one in sizes):
            raise ValueError(f"mini-batches must be cut alike to be stacked, got {sizes}")
        return [
            MicroBatch(
                functools.partial(self._evaluate_many, [draw[index] for draw in draws], index, parameters, copies),
                size / sum(sizes[0]),
            )
            for index, size in enumerate(sizes[0])
        ]

    def _evaluate_many(
        self, probes: Sequence[ProbeBatch], index: int, parameters: Sequence[Tensor], copies: Sequence[Tensor]
    ) -> Evaluation:
        stacked = stack(self.moved(probes))
        losses, outputs = self._stacked(stacked, index, probes[0].seed, parameters, copies)
        return Evaluation(losses.sum(), outputs)

    def moved(self, probes: Sequence[ProbeBatch]) -> list[Any]:
        """Return batches as ``training_step`` receives them."""
        batches = []
        for probe in probes:
            # A hook that augments on the device changes the module before the step does.
            self._state.restore(gently=True)
            batches.append(to_device(self._trainer, self._objective.module, probe))
        return batches

    def losses_of_many(
        self, stacked: Stacked, seed: int, parameters: Sequence[Tensor] = (), copies: Sequence[Tensor] = ()
    ) -> Tensor:
        """Losses of batches that were moved and stacked, (batches,).

        Args:
            stacked: the batches.
            seed: of their random numbers.
            parameters: those that have a copy for each batch; all others are as they are.
            copies: of each, (batches, shape).

        Raises:
            Exception: see :func:`~.losses.stacked.stacked_losses`.
        """
        self._state.restore(gently=True)
        # Fused attention has no rule for ``vmap`` on a CPU, which would go through it sample by sample.
        with differentiable():
            return self._stacked(stacked, 0, seed, parameters, copies)[0]

    def _stacked(
        self,
        stacked: Stacked,
        index: int,
        seed: int,
        parameters: Sequence[Tensor] = (),
        copies: Sequence[Tensor] = (),
    ) -> tuple[Tensor, Tensor | None]:
        randomness = self._seeded(seed)

        def record(batch: Any) -> RecordedBatch:
            return self._objective.prepare(batch, index, randomness, self._state)

        with self._precision(), same_attention(self._objective.module):
            return stacked_losses(self._objective, record, stacked, parameters, copies)

    def loss_of(self, batch: Any, seed: int) -> Tensor:
        """Loss of one batch that was moved, at the parameters as they are."""
        return self._repeat(batch, 0, self._seeded(seed)).loss

    def parts_of_step(self, calls: Sequence[tuple[Any, int, RandomState]], ranks: int) -> list[MicroBatch]:
        """Return micro-batches of a step about to be made, weighted as Lightning averages their gradients: equally.

        Args:
            calls: batch on the device, ``batch_idx`` and random state of each call of ``training_step`` on this rank.
            ranks: number of ranks.
        """
        return [MicroBatch(functools.partial(self._repeat, *call), 1 / len(calls) / ranks) for call in calls]

    def _repeat(self, batch: Any, index: int, randomness: RandomState) -> Evaluation:
        self._state.restore(gently=True)
        record = self._objective.prepare(batch, index, randomness, self._state)
        with self._precision(), same_attention(self._objective.module):
            return self._objective.evaluate(record)

    def _seeded(self, seed: int) -> RandomState:
        randomness = DataRandomness(self._objective.device)
        with randomness.kept():
            randomness.seed(seed)
            return RandomState(self._objective.device)
