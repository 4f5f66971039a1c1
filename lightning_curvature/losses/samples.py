"""The losses of single samples: many at once where the training step allows it."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_curvature.data.ordered import OrderedSamples
from lightning_curvature.data.probe_set import ProbeBatch
from lightning_curvature.losses.fixed import ProbeLoss
from lightning_curvature.losses.stacked import Stacked, copies_of, single_samples, stack
from lightning_curvature.operators import MicroBatch
from lightning_curvature.operators.differentiation import differentiable
from lightning_curvature.operators.graphs import pull_back_rows
from lightning_curvature.operators.micro_batches import Evaluation, building_graphs

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


@dataclass(frozen=True)
class SampleGraphs:
    """Gradients of m samples by copies of the block, one copy a sample, with their graph.

    Attributes:
        gradients: (m, D).
        copies: (m, …).
    """

    gradients: Tensor
    copies: Tensor

    def products(self, vectors: Tensor) -> Tensor:
        """Products of the Hessian of each sample with q vectors, (q, D): (q, m, D)."""
        count, size = self.gradients.shape
        rows = vectors.to(self.gradients.dtype)[:, None, :].expand(-1, count, -1)
        with building_graphs():
            found = pull_back_rows(self.gradients, self.copies, rows)
        return rows.new_zeros(len(vectors), count, size) if found is None else found.reshape(len(vectors), count, size)


class BlockSamples:
    """The samples of a micro-batch, each with a loss of its own: that of the training step on a batch of one.

    To be made anew for each measurement, inside :func:`~.replay.isolation.untouched`.

    Args:
        loss: repeats the training step.
        probe: the micro-batch.
    """

    def __init__(self, loss: ProbeLoss, probe: ProbeBatch) -> None:
        self._loss, self.size, self._seed = loss, probe.size, probe.seed
        (self.batch,) = loss.moved([probe])

    def whole(self) -> Tensor:
        """Loss of the whole micro-batch."""
        with differentiable():  # also without gradients: the same code, and nothing is compiled for it
            return self._loss.loss_of(self.batch, self._seed)

    def losses(self, at_once: bool) -> Tensor:
        """Loss of each sample, (m,)."""
        stacked = single_samples(self.batch, self.size)
        if at_once:
            return self._loss.losses_of_many(stacked, self._seed)
        return torch.stack([self._one(sample) for sample in self._singles()])

    def mean(self, at_once: bool) -> Tensor:
        """Mean of the losses of the samples, with a graph where gradients are enabled; by the shortest way there is."""
        return self.whole() if self.is_mean(at_once) else self.losses(at_once).mean()

    def is_mean(self, at_once: bool, whole: Tensor | None = None) -> bool:
        """Whether the loss of the micro-batch, evaluated where it is not given, is the mean of those of its samples."""
        with torch.no_grad():
            whole = self.whole() if whole is None else whole.detach()
            mean = self.losses(at_once).mean()
        return alike(whole, mean)

    def can_be_stacked(self, parameter: Tensor) -> bool:
        """Whether ``torch.vmap`` can follow the step, differentiated twice, and gives what the step gives."""
        try:
            with torch.no_grad():
                losses = self.losses(at_once=True)
                last = self._one(list(self._singles())[-1])
            (graphs,) = self.graphs(parameter, at_once=True)
            graphs.products(torch.zeros(1, parameter.numel(), device=parameter.device))
        except Exception:  # what it cannot follow
            return False
        return alike(losses[-1], last)

    def graphs(self, parameter: Tensor, at_once: bool) -> Iterator[SampleGraphs]:
        """Gradients by the block with their graphs: of all samples at once, or one after the other."""
        if at_once:
            copies = copies_of([parameter], self.size)
            with building_graphs():
                losses = self._loss.losses_of_many(
                    single_samples(self.batch, self.size), self._seed, [parameter], copies
                )
                graphs = _graphs(losses.sum(), copies[0], self.size)
            # Outside of the context, in which nothing else is to run.
            yield graphs
            return
        for sample in self._singles():
            with building_graphs():
                graphs = _graphs(self._one(sample), parameter, 1)
            yield graphs

    def _singles(self) -> Iterator[Any]:
        tensors, rebuild = single_samples(self.batch, self.size)
        for number in range(self.size):
            yield rebuild([t[number] for t in tensors])

    def _one(self, sample: Any) -> Tensor:
        with differentiable():
            return self._loss.loss_of(sample, self._seed)


def _graphs(loss: Tensor, leaves: Tensor, count: int) -> SampleGraphs:
    found = None
    if loss.requires_grad:
        (found,) = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
    if found is None:
        raise ValueError("the loss must depend on the parameter, got one that does not: choose another parameter.")
    return SampleGraphs(found.reshape(count, -1), leaves)
