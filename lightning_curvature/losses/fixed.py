"""The loss of fixed micro-batches as a function of the parameters: the training step, repeated."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_curvature.data.copies import DataRandomness
from lightning_curvature.data.probe_set import ProbeBatch, ProbeSet, to_device
from lightning_curvature.losses.stacked import Stacked, stack
from lightning_curvature.operators.differentiation import differentiable, patched, same_attention
from lightning_curvature.operators.micro_batches import Evaluation, MakeContext, MicroBatch
from lightning_curvature.replay.isolation import parameters_replaced
from lightning_curvature.replay.objective import StepObjective
from lightning_curvature.replay.randomness import RandomState
from lightning_curvature.replay.recording import NoLossError

ProbeMode = Literal["train", "eval"]
Precision = Callable[[], contextlib.AbstractContextManager[object]]


class ProbeLoss:
    """Repeats the training step on batches that were read, each time from the same states.

    The seed of a batch sets its random numbers: dropout has one mask a batch, in every product and at every measured
    step. BatchNorm normalizes each micro-batch by its own statistics in "train" mode, by the running ones, which are
    constants, in "eval" mode.

    To be made and used inside :meth:`~.replay.objective.StepObjective.untouched`.

    Args:
        precision: makes the context of a forward.
        mode: "train" leaves the module as it trains, "eval" switches it.

    Attributes:
        mode: as given.
        second: what the fit has learned of second derivatives.
        gathers: what it has learned of the gatherings of sharded parameters.
    """

    def __init__(self, trainer: pl.Trainer, objective: StepObjective, precision: Precision, mode: ProbeMode) -> None:
        self._trainer, self._objective, self._precision, self.mode = trainer, objective, precision, mode
        if mode == "eval":
            objective.module.eval()
        self._state, self.second, self.gathers = objective.state(), objective.second, objective.gathers
        self._context: MakeContext | None = None
        objective.rewrites.hold()

    def parts(self, probe_set: ProbeSet) -> list[MicroBatch]:
        """Return this rank's micro-batches of a set that ranks share.

        Every rank has the same number, since a forward may communicate (a step that gathers, sharded parameters): a
        rank with fewer repeats its last one with weight 0.
        """
        parts = self.parts_of(probe_set.batches, probe_set.total)
        return parts + [replace(parts[-1], weight=0.0)] * (probe_set.rounds - len(parts))

    def with_loss(self, probe_set: ProbeSet) -> list[int]:
        """Return which of this rank's batches the step does not pass over, by one forward of each."""
        lost = set()
        for index, part in enumerate(self.parts(probe_set)):
            try:
                with torch.no_grad():
                    part.evaluate()
            except NoLossError:
                lost.add(index)
            except Exception:  # the measurement will meet it, and say so
                continue
        return [index for index in range(len(probe_set.batches)) if index not in lost]

    def parts_of(self, batches: Sequence[ProbeBatch], total: int) -> list[MicroBatch]:
        """Return micro-batches, each weighted by its share of ``total`` samples."""

        def evaluate(probe: ProbeBatch, index: int) -> Evaluation:
            (batch,) = self.moved([probe])
            return self._repeat(batch, index, self.seeded(probe.seed))

        calls = [(functools.partial(evaluate, one, i), one.size / total) for i, one in enumerate(batches)]
        return [self.micro_batch(*call) for call in calls]

    def micro_batch(
        self, evaluate: Callable[[], Evaluation], weight: float, settle: Callable[[], object] = lambda: None
    ) -> MicroBatch:
        """Return a micro-batch that is evaluated by repeated steps, the same in each evaluation after ``settle()``."""

        def whole() -> Evaluation:
            with self.gathers.forwards(1 + (not self._objective.rewrites.checked)):
                return evaluate()

        def stepwise(context: MakeContext) -> Evaluation:
            settle()
            with patched(self, _context=context):
                return whole()

        return MicroBatch(whole, weight, stepwise)

    def parts_of_many(
        self, draws: Sequence[Sequence[ProbeBatch]], parameters: Sequence[Tensor], copies: Sequence[Tensor]
    ) -> list[MicroBatch]:
        """Return micro-batches of several mini-batches, each at its own copy of parameters: see :meth:`losses_of_many`.

        Raises:
            ValueError: if mini-batches differ in number or sizes of their micro-batches.
        """
        sizes = [[probe.size for probe in draw] for draw in draws]
        if any(one != sizes[0] for one in sizes):
            raise ValueError(f"mini-batches must be cut alike to be stacked, got {sizes}")

        def evaluate(index: int) -> Evaluation:
            stacked, seed = stack(self.moved([draw[index] for draw in draws])), draws[0][index].seed
            losses, outputs = self._evaluate_stacked(stacked, index, seed, parameters, copies)
            return Evaluation(losses.sum(), outputs)

        total = sum(sizes[0])
        return [MicroBatch(functools.partial(evaluate, i), size / total) for i, size in enumerate(sizes[0])]

    def moved(self, probes: Sequence[ProbeBatch]) -> list[Any]:
        """Return batches as ``training_step`` receives them."""
        batches = []
        for probe in probes:
            # A hook that augments on the device changes the module before the step does.
            self._state.restore()
            batches.append(to_device(self._trainer, self._objective.module, probe))
        return batches

    def losses_of_many(
        self, stacked: Stacked, seed: int, parameters: Sequence[Tensor] = (), copies: Sequence[Tensor] = ()
    ) -> Tensor:
        """Return the losses of stacked batches, (batches,), each at its copy of ``parameters``.

        Batches are moved, then stacked by :func:`~.losses.stacked.stack`; ``copies`` are (batches, shape) each.

        Raises:
            Exception: any that ``torch.vmap`` raises for a step that it cannot follow: one that draws random numbers,
                reads a value (``loss.item()``), or writes to a buffer.
        """
        self._state.restore()
        # On a CPU fused attention has no rule for ``vmap``, which would evaluate it sample by sample.
        with differentiable():
            return self._evaluate_stacked(stacked, 0, seed, parameters, copies)[0]

    def _evaluate_stacked(
        self, stacked: Stacked, index: int, seed: int, parameters: Sequence[Tensor], copies: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Losses, (batches,), and outputs, (batches, B, …), or None."""
        objective, randomness, (tensors, rebuild) = self._objective, self.seeded(seed), stacked
        self.check(MicroBatch(lambda: self._repeat(rebuild([t[0] for t in tensors]), index, randomness), 1.0))

        def evaluate(copy: tuple[Tensor, ...], batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            values = {id(p): value for p, value in zip(parameters, copy, strict=True)}
            with parameters_replaced(objective.module, values):
                record = objective.prepare(rebuild(batch), index, randomness, self._state)
                evaluation = objective.evaluate(record, mode=self._context and self._context())
            return (evaluation.loss,) if evaluation.outputs is None else (evaluation.loss, evaluation.outputs)

        with self._precision(), same_attention(objective.module):
            losses, *outputs = torch.vmap(evaluate, randomness="error")(tuple(copies), tensors)
        return losses, outputs[0] if outputs else None

    def check(self, part: MicroBatch) -> None:
        """Evaluate a micro-batch once, without a graph, unless the step of this fit was found to be repeatable."""
        if not self._objective.rewrites.checked:
            with torch.no_grad():
                part.evaluate()

    def loss_of(self, batch: Any, seed: int) -> Tensor:
        """Return the loss of one batch that was moved, at the parameters as they are."""
        return self._repeat(batch, 0, self.seeded(seed)).loss

    def parts_of_step(self, calls: Sequence[tuple[Any, int, RandomState]], ranks: int) -> list[MicroBatch]:
        """Return micro-batches of a step about to be made, weighted as Lightning averages their gradients: equally.

        ``calls`` are batch on the device, ``batch_idx`` and random state of each ``training_step`` on this rank.
        """
        return [self.micro_batch(functools.partial(self._repeat, *call), 1 / len(calls) / ranks) for call in calls]

    def _repeat(self, batch: Any, index: int, randomness: RandomState) -> Evaluation:
        self._state.restore()
        record = self._objective.prepare(batch, index, randomness, self._state)
        with self._precision(), same_attention(self._objective.module):
            expected = self._objective.rehearse(record)
            evaluation = self._objective.evaluate(record, mode=self._context and self._context())
        self._objective.confirm(expected, evaluation.loss)
        return evaluation

    def seeded(self, seed: int) -> RandomState:
        """Return the state of random generators that a seed makes."""
        randomness = DataRandomness(self._objective.device)
        with randomness.kept():
            randomness.seed(seed)
            return RandomState(self._objective.device)
