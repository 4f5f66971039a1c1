"""Losses of single samples: batched by ``torch.vmap`` where it can follow the training step, else one by one."""

import contextlib
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
from lightning_curvature.functional.products import differentiable_gradients
from lightning_curvature.losses.cut import cut_samples
from lightning_curvature.losses.fixed import ProbeLoss
from lightning_curvature.losses.stacked import Stacked, copies_of, single_samples, stack
from lightning_curvature.operators.differentiation import differentiable
from lightning_curvature.operators.graphs import pull_back_rows
from lightning_curvature.operators.micro_batches import Evaluation, MicroBatch, building_graphs

# Reordered sums differ by a few units in float32's seventh digit; half precision by more, so it takes the slower way.
_AGREEMENT = 1e-5
# Sizes of a batch that a step may ask for where it does not take one sample: pairs, and the micro-batch's usual eight.
_COPIES = (2, 8)


def equal_up_to_rounding(one: Tensor, other: Tensor) -> bool:
    """Return whether all entries of two tensors agree to 1e-5, relative to ``other``; NaN equals NaN."""
    close = (one - other).abs() <= _AGREEMENT * other.abs()
    return bool((close | (one.isnan() & other.isnan())).all())


class ForbidCollectives(TorchDispatchMode):
    """Raise a MisconfigurationException before ranks communicate: each evaluates other samples, and some none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace:
            raise MisconfigurationException(
                f"training_step must not communicate between ranks where single samples are measured, got {func}: give "
                "objective= a callable that does without, or call evaluate() in one process."
            )
        return func(*args, **(kwargs or {}))


class SampleBatch:
    """Samples as batches of one, whose losses are theirs, with their seeds; and all of them as one batch."""

    def __init__(self, loss: ProbeLoss, singles: Sequence[Any], seeds: Sequence[int]) -> None:
        self._loss, self._singles, self._seeds, self.size = loss, singles, seeds, len(seeds)
        self._is_checked = False

    @functools.cached_property
    def stacked(self) -> Stacked:
        """The batches of one, stacked."""
        return stack(self._singles)

    @functools.cached_property
    def batch(self) -> Any:
        """All samples as one batch."""
        tensors, rebuild = self.stacked
        if any(t.ndim < 2 or t.shape[1] != 1 for t in tensors):
            raise ValueError("tensors of a sample must have one row to make a batch")
        return rebuild([t.flatten(0, 1) for t in tensors])

    def whole(self) -> Tensor:
        """Return the loss of all samples as one batch."""
        return self._loss.loss_of(self.batch, self._seeds[0])

    def one(self, index: int) -> Tensor:
        """Return the loss of one sample."""
        try:
            return self._loss.loss_of(self._singles[index], self._seeds[index])
        except Exception as error:
            if not self._fails_alone(index):
                raise
            got = f"{type(error).__name__} ({error})" if str(error) else type(error).__name__
            remedy = "give objective= the loss of a single sample"
            if self._loss.mode == "train":
                remedy += ", or probe_mode='eval' for layers that normalize by the batch"
            raise ValueError(
                "training_step must take a batch of one where samples are evaluated one at a time, got "
                f"{got} for one alone and none for several: {remedy}."
            ) from error

    def _fails_alone(self, index: int) -> bool:
        """Return whether the step takes a sample, which it did not take, where the batch has it several times."""
        single, seed = self._singles[index], self._seeds[index]
        for copies in _COPIES:
            with torch.no_grad(), contextlib.suppress(Exception):
                SampleBatch(self._loss, [single] * copies, [seed] * copies).whole()
                return True
        return False

    def losses(self, batched: bool, parameters: Sequence[Tensor] = (), copies: Sequence[Tensor] = ()) -> Tensor:
        """Return the loss of each sample, (n,); where batched, each at its copy of some parameters."""
        if batched:
            return self._loss.losses_of_many(self.stacked, self._seeds[0], parameters, copies)
        return torch.stack([self.one(index) for index in range(self.size)])

    def batched_losses(self) -> Tensor | None:
        """Return the loss of each sample, batched; None where ``torch.vmap`` cannot follow the step."""
        try:
            losses = self.losses(batched=True)
            with torch.no_grad():  # once, for the last sample
                self._is_checked = self._is_checked or equal_up_to_rounding(losses[-1], self.one(-1))
        except Exception:  # of any kind, from the user's code under ``torch.vmap``
            return None
        return losses if self._is_checked else None


class SampleLosses:
    """Losses ℓ_i of single samples, and means of them, at the parameters as they are.

    Where the loss of a batch is the mean of its samples' (checked once for each batch), means come from whole batches;
    else from single samples, batched where supported. A batch has ``size`` samples. To be made for each measurement,
    inside :meth:`~.replay.objective.StepObjective.untouched`.
    """

    def __init__(self, loss: ProbeLoss, samples: OrderedSamples, size: int) -> None:
        self._loss, self.samples, self._size, self.second = loss, samples, size, loss.second
        self._moved: dict[int, tuple[Any, Any]] = {}
        self._batches: dict[tuple[int, ...], SampleBatch] = {}
        self._is_mean: dict[tuple[int, ...], bool] = {}
        self._batched = True

    def check_local(self) -> None:
        """Raise a MisconfigurationException if the training step communicates: see :class:`ForbidCollectives`."""
        with torch.no_grad(), differentiable(), ForbidCollectives():
            for number in list(self.samples.own)[:1]:
                self.one(number)

    def one(self, number: int) -> Tensor:
        """Return the loss of one of this rank's samples."""
        return self._batch((number,)).one(0)

    def each(self, numbers: Sequence[int]) -> Tensor:
        """Return the losses of some of this rank's samples, (len(numbers),)."""
        losses: dict[int, Tensor] = {}
        for chunk in self._chunks(numbers):
            losses |= dict(zip(chunk, self._losses(chunk), strict=True))
        return torch.stack([losses[number] for number in numbers]) if losses else torch.zeros(0)

    def parts(self, numbers: Sequence[int], total: int) -> list[MicroBatch]:
        """Return micro-batches of those of the numbers that this rank holds, weighted by their share of ``total``."""
        chunks = self._chunks(self.samples.among(numbers))
        return [
            self._loss.micro_batch(
                functools.partial(self._evaluate, chunk), len(chunk) / total, functools.partial(self._settle, chunk)
            )
            for chunk in chunks
        ]

    def _settle(self, chunk: tuple[int, ...]) -> None:
        """Find out, once, whether the loss of a batch is the mean of its samples'."""
        if len(chunk) == 1 or chunk in self._is_mean:
            return
        self._is_mean[chunk] = False
        # Samples may make no batch, and a step may be for single samples.
        with torch.no_grad(), contextlib.suppress(Exception):
            self._is_mean[chunk] = equal_up_to_rounding(self._batch(chunk).whole(), self._losses(chunk).mean())

    def _evaluate(self, chunk: tuple[int, ...]) -> Evaluation:
        self._settle(chunk)
        batch = self._batch(chunk)
        if len(chunk) == 1:
            return Evaluation(batch.one(0))
        return Evaluation(batch.whole() if self._is_mean[chunk] else self._losses(chunk).mean())

    def _losses(self, chunk: tuple[int, ...]) -> Tensor:
        """Losses of samples of one form."""
        if self._batched and len(chunk) > 1:
            losses = self._batch(chunk).batched_losses()
            if losses is not None:
                return losses
            self._batched = False
        return self._batch(chunk).losses(batched=False)

    def _chunks(self, numbers: Sequence[int]) -> list[tuple[int, ...]]:
        """Chunks of samples of one form, each as large as a batch."""
        by_form: dict[Any, list[int]] = {}
        for number in numbers:
            by_form.setdefault(self._sample(number)[1], []).append(number)
        size = self._size
        return [tuple(of[at : at + size]) for of in by_form.values() for at in range(0, len(of), size)]

    def _batch(self, chunk: tuple[int, ...]) -> SampleBatch:
        if chunk not in self._batches:
            seeds = [self.samples.own[number].seed for number in chunk]
            self._batches[chunk] = SampleBatch(self._loss, [self._sample(number)[0] for number in chunk], seeds)
        return self._batches[chunk]

    def _sample(self, number: int) -> tuple[Any, Any]:
        """A sample on the device, and its form: the shapes of its tensors, or its number where it cannot be stacked."""
        if number not in self._moved:
            (sample,) = self._loss.moved([self.samples.own[number]])
            try:
                form: Any = tuple((t.shape, t.dtype) for t in stack([sample])[0])
            except ValueError:
                form = number
            self._moved[number] = sample, form
        return self._moved[number]


@dataclass(frozen=True)
class SampleGraphs:
    """Gradients of m samples, (m, D), by copies of the block, (m, …), one copy a sample, with their graph."""

    gradients: Tensor
    copies: Tensor

    def products(self, vectors: Tensor) -> Tensor:
        """Return the products of the Hessian of each sample with q vectors, (q, D): (q, m, D)."""
        count, size = self.gradients.shape
        rows = vectors.to(self.gradients.dtype)[:, None, :].expand(-1, count, -1)
        with building_graphs():
            products = pull_back_rows(self.gradients, self.copies, rows)
        shape = len(vectors), count, size
        return rows.new_zeros(shape) if products is None else products.reshape(shape)


class BlockSamples(SampleBatch):
    """The samples of a micro-batch, and derivatives of their losses by a block of parameters.

    Without gradients too, forwards run the code that can be differentiated twice: nothing is compiled for them.
    """

    def __init__(self, loss: ProbeLoss, probe: ProbeBatch) -> None:
        (batch,) = loss.moved([probe])
        super().__init__(loss, cut_samples(batch, probe.size), [probe.seed] * probe.size)
        self.batch = batch

    @functools.cached_property
    def stacked(self) -> Stacked:
        """The samples, stacked."""
        return single_samples(self.batch, self.size)

    def whole(self) -> Tensor:
        """Return the loss of the whole micro-batch."""
        with differentiable():
            return super().whole()

    def one(self, index: int) -> Tensor:
        """Return the loss of one sample, which is cut out of the micro-batch."""
        with differentiable():
            return super().one(index)

    def mean(self, batched: bool) -> Tensor:
        """Return the mean of the samples' losses, by the whole micro-batch where its loss is that mean."""
        return self.whole() if self.is_mean(batched) else self.losses(batched).mean()

    def is_mean(self, batched: bool, whole: Tensor | None = None) -> bool:
        """Return whether the loss of the micro-batch, evaluated where it is not given, is the mean of its samples'."""
        with torch.no_grad():
            whole = self.whole() if whole is None else whole
            return equal_up_to_rounding(whole, self.losses(batched).mean())

    def losses_can_be_batched(self) -> bool:
        """Return whether ``torch.vmap`` can follow the step, and gives what the step gives."""
        with torch.no_grad():
            return self.batched_losses() is not None

    def graphs_can_be_batched(self, parameter: Tensor) -> bool:
        """Return whether it can also follow the step where that is differentiated twice."""
        try:
            (graphs,) = self.graphs(parameter, batched=True)
            graphs.products(torch.zeros(1, parameter.numel(), device=parameter.device))
        except Exception:  # see ``batched_losses``
            return False
        return True

    def graphs(self, parameter: Tensor, batched: bool) -> Iterator[SampleGraphs]:
        """Yield the gradients by the block with their graphs: of all samples, or of one after the other."""
        # Each is yielded outside of the context, in which nothing else is to run.
        if batched:
            (copies,) = copies_of([parameter], self.size)
            with building_graphs():
                graphs = _graphs(self.losses(True, [parameter], [copies]).sum(), copies, self.size)
            yield graphs
            return
        for index in range(self.size):
            with building_graphs():
                graphs = _graphs(self.one(index), parameter, 1)
            yield graphs


def _graphs(loss: Tensor, leaves: Tensor, count: int) -> SampleGraphs:
    gradients = None
    if loss.requires_grad:
        (gradients,) = differentiable_gradients(loss, [leaves])
    if gradients is None:
        raise ValueError("the loss must depend on the parameter, got one that does not: choose another parameter.")
    return SampleGraphs(gradients.reshape(count, -1), leaves)
