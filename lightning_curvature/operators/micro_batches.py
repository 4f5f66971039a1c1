"""The data an operator sums over: micro-batches with their weights."""

import contextlib
import functools
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_curvature.operators.differentiation import differentiable


@dataclass
class Evaluation:
    """Loss and, where they can be had, outputs of one batch.

    Attributes:
        loss: scalar mean loss.
        outputs: outputs of shape (B, …), or None.
        mask: weight of each position, or None.
    """

    loss: Tensor
    outputs: Tensor | None = None
    mask: Tensor | None = None


@dataclass(frozen=True)
class MicroBatch:
    """A part of the data, small enough to be differentiated at once.

    Attributes:
        evaluate: returns the mean loss of the part, and its outputs, at the parameters as they are, with their graph
            where gradients are enabled. Must give the same every time.
        weight: its samples over those of all parts of all ranks: the loss is Σ weight · loss.
    """

    evaluate: Callable[[], Evaluation]
    weight: float


def micro_batches(
    model: Callable[[Any], Tensor], loss_function: Callable[[Tensor, Any], Tensor], batches: Iterable[tuple[Any, Any]]
) -> list[MicroBatch]:
    """Make micro-batches of (inputs, targets), each weighted by its number of samples.

    Args:
        model: maps inputs to outputs, always in the same way: no dropout, no BatchNorm in training mode.
        loss_function: mean loss of (outputs, targets).
        batches: all data; kept, since every product goes through it again.

    Raises:
        ValueError: if there are none.

    Example:
        >>> data = [(torch.ones(8, 1), torch.ones(8, 1)), (torch.ones(2, 1), torch.ones(2, 1))]
        >>> [part.weight for part in micro_batches(torch.nn.Linear(1, 1), torch.nn.functional.mse_loss, data)]
        [0.8, 0.2]
    """
    kept = list(batches)
    if not kept:
        raise ValueError("batches must hold at least one batch, got none: give a list of (inputs, targets).")

    def evaluate(x: Any, y: Any) -> Evaluation:
        outputs = model(x)
        return Evaluation(loss_function(outputs, y), outputs)

    total = sum(sample_count(y) for _, y in kept)
    return [MicroBatch(functools.partial(evaluate, x, y), sample_count(y) / total) for x, y in kept]


def sample_count(targets: Any) -> int:
    """Number of samples: the length of the first tensor in the targets of a batch.

    Raises:
        ValueError: if there is none.
    """
    found = [leaf for leaf in tree_leaves(targets) if isinstance(leaf, Tensor) and leaf.ndim > 0]
    if not found:
        raise ValueError(
            f"targets must hold a tensor with the samples along its first dimension, got {type(targets).__name__}: "
            "give the batches as (inputs, targets)."
        )
    return len(found[0])


@contextlib.contextmanager
def building_graphs() -> Generator[None, None, None]:
    """Context in which a graph is built that will be differentiated again."""
    with torch.enable_grad(), differentiable():
        yield
