"""Gradients and Hessian products of single samples, by one block of the parameters."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_curvature.data.probe_set import ProbeBatch
from lightning_curvature.losses.fixed import ProbeLoss
from lightning_curvature.losses.samples import alike
from lightning_curvature.losses.stacked import copies_of, single_samples
from lightning_curvature.operators.differentiation import differentiable
from lightning_curvature.operators.graphs import pull_back_rows
from lightning_curvature.operators.micro_batches import building_graphs


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
