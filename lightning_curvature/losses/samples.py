"""The losses of single samples: many at once where the training step allows it."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_curvature.data.ordered import OrderedSamples
from lightning_curvature.losses.fixed import ProbeLoss
from lightning_curvature.losses.stacked import Stacked, stack
from lightning_curvature.operators import MicroBatch
from lightning_curvature.operators.differentiation import differentiable
from lightning_curvature.replay.evaluation import Evaluation

# Sums over a batch are made in another order; in float32 a few units in the seventh digit, and one ten-thousandth is
# seen in half precision alone, where the slower way is taken for it.
_AGREEMENT = 1e-5


class SampleLosses:
    """Losses ℓ_i of single samples, and means of them, at the parameters as they are.

    A sample is what the training step gives a loss for when it is the only one in its batch. Where the loss of a batch
    is the mean of these, which is checked for each batch once, means are taken of whole batches; else each sample is
    evaluated by itself: all at once by ``torch.vmap``, or one after the other where it cannot follow the step.

    To be made anew for each measurement, inside :func:`~.replay.isolation.untouched`.

    Args:
        loss: repeats the training step.
        samples: the samples.
        size: samples evaluated at once.
    """

    def __init__(self, loss: ProbeLoss, samples: OrderedSamples, size: int) -> None:
        self._loss, self.samples, self._size = loss, samples, size
        self._moved: dict[int, Any] = {}
        self._stacked: dict[tuple[int, ...], Stacked] = {}
        self._whole: dict[tuple[int, ...], Any] = {}
        self._checked: set[tuple[int, ...]] = set()
        self._at_once = True

    def check_local(self) -> None:
        """Check that a loss is made on one rank alone: samples are shared out, and each is for one of them to evaluate.

        Raises:
            MisconfigurationException: if the training step communicates.
        """
        with torch.no_grad(), differentiable(), Alone():
            for number in list(self.samples.own)[:1]:
                self.one(number)

    def one(self, number: int) -> Tensor:
        """Loss of one of this rank's samples."""
        return self._loss.loss_of(self._batch(number), self._seed(number))

    def each(self, numbers: Sequence[int]) -> Tensor:
        """Losses of samples of this rank, (len(numbers),)."""
        found: dict[int, Tensor] = {}
        for chunk in self._chunks(numbers):
            found |= dict(zip(chunk, self._losses(chunk), strict=True))
        return torch.stack([found[number] for number in numbers]) if found else torch.zeros(0)

    def parts(self, numbers: Sequence[int], total: int) -> list[MicroBatch]:
        """Micro-batches of those of the numbers that this rank holds, each weighted by its share of ``total``."""
        return [
            MicroBatch(functools.partial(self._evaluate, chunk), len(chunk) / total)
            for chunk in self._chunks(self.samples.among(numbers))
        ]

    def _evaluate(self, chunk: tuple[int, ...]) -> Evaluation:
        if len(chunk) == 1:
            return Evaluation(self.one(chunk[0]))
        if chunk not in self._whole:
            self._whole[chunk] = self._whole_batch(chunk)
        batch = self._whole[chunk]
        if batch is None:
            return Evaluation(self._losses(chunk).mean())
        return Evaluation(self._loss.loss_of(batch, self._seed(chunk[0])))

    def _whole_batch(self, chunk: tuple[int, ...]) -> Any:
        """All samples of a chunk as one batch, where its loss is the mean of theirs; else None."""
        try:
            tensors, rebuild = self._stack(chunk)
            if any(t.ndim < 2 or t.shape[1] != 1 for t in tensors):
                return None
            batch = rebuild([t.flatten(0, 1) for t in tensors])
            with torch.no_grad():
                whole = self._loss.loss_of(batch, self._seed(chunk[0]))
        except Exception:  # batches that cannot be put together, or a step for single samples
            return None
        with torch.no_grad():
            return batch if alike(whole, self._losses(chunk).mean()) else None

    def _losses(self, chunk: tuple[int, ...]) -> Tensor:
        """Losses of samples of one shape."""
        if self._at_once and len(chunk) > 1:
            try:
                losses = self._loss.losses_of_many(self._stack(chunk), self._seed(chunk[0]))
                with torch.no_grad():
                    if chunk in self._checked or alike(losses[-1], self.one(chunk[-1])):
                        self._checked.add(chunk)
                        return losses
            except Exception:  # what ``vmap`` cannot follow
                pass
            self._at_once = False
        return torch.stack([self.one(number) for number in chunk])

    def _chunks(self, numbers: Sequence[int]) -> list[tuple[int, ...]]:
        """Samples that can be stacked, as many as are evaluated at once."""
        shapes: dict[Any, list[int]] = {}
        for number in numbers:
            shapes.setdefault(self._shape(number), []).append(number)
        return [
            tuple(alike[first : first + self._size])
            for alike in shapes.values()
            for first in range(0, len(alike), self._size)
        ]

    def _shape(self, number: int) -> Any:
        try:
            tensors, _ = self._stack((number,))
        except ValueError:  # nothing to be stacked
            return number
        return tuple((t.shape, t.dtype) for t in tensors)

    def _stack(self, chunk: tuple[int, ...]) -> Stacked:
        if chunk not in self._stacked:
            self._stacked[chunk] = stack([self._batch(number) for number in chunk])
        return self._stacked[chunk]

    def _batch(self, number: int) -> Any:
        if number not in self._moved:
            (self._moved[number],) = self._loss.moved([self.samples.own[number]])
        return self._moved[number]

    def _seed(self, number: int) -> int:
        return self.samples.own[number].seed


class Alone(TorchDispatchMode):
    """Raises before ranks communicate."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace:
            raise MisconfigurationException(
                f"training_step must not communicate between ranks where single samples are measured, got {func}: give "
                "objective= a callable that does without, or call evaluate() in one process."
            )
        return func(*args, **(kwargs or {}))


def alike(one: Tensor, other: Tensor) -> bool:
    """Whether two losses are the same but for the order of their sums."""
    return bool((one - other).abs() <= _AGREEMENT * other.abs()) or bool(one.isnan() and other.isnan())
