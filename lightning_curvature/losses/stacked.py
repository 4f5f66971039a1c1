"""The training step on several mini-batches at once, each at a copy of the parameters of its own."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.flop_counter import FlopCounterMode

from lightning_curvature.operators.differentiation import differentiable
from lightning_curvature.replay.isolation import parameters_replaced
from lightning_curvature.replay.objective import RecordedBatch, StepObjective

# Tensors of batches of one form, stacked, and a function that makes a batch of one row of each.
Stacked = tuple[tuple[Tensor, ...], Callable[[Sequence[Tensor]], Any]]


def copies_of(parameters: Sequence[Tensor], count: int) -> list[Tensor]:
    """Return each parameter ``count`` times, (count, shape): leaves to differentiate by, which share its memory.

    The Hessian of losses of several mini-batches, each at its copy, has one block for each of them: one product
    multiplies a vector for each.
    """
    return [p.detach().expand(count, *p.shape).requires_grad_() for p in parameters]


def stacked_losses(
    objective: StepObjective,
    record: Callable[[Any], RecordedBatch],
    stacked: Stacked,
    parameters: Sequence[Tensor] = (),
    copies: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor | None]:
    """Return the losses of the training step on several batches, each at its own copy of some parameters.

    Args:
        objective: the training step.
        record: makes the record of a step from its batch.
        stacked: the batches, by :func:`stack`.
        parameters: those that have copies.
        copies: of each, (batches, shape).

    Returns:
        The losses, (batches,), and the outputs, (batches, B, …), or None.

    Raises:
        Exception: any that ``torch.vmap`` raises for a step that it cannot follow: one that draws random numbers, reads
            a value (``loss.item()``), or writes to a buffer.
    """
    tensors, rebuild = stacked

    def evaluate(copy: tuple[Tensor, ...], batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        values = {id(p): value for p, value in zip(parameters, copy, strict=True)}
        with parameters_replaced(objective.module, values):
            evaluation = objective.evaluate(record(rebuild(batch)))
        return (evaluation.loss,) if evaluation.outputs is None else (evaluation.loss, evaluation.outputs)

    losses, *outputs = torch.vmap(evaluate, randomness="error")(tuple(copies), tensors)
    return losses, outputs[0] if outputs else None


def stack(batches: Sequence[Any]) -> Stacked:
    """Return the tensors of batches of one form, stacked, and a function that makes a batch of one row of each.

    Raises:
        ValueError: if they differ in structure, in shapes, or in anything that is no tensor; or hold none.
    """
    leaves, structures = zip(*map(tree_flatten, batches), strict=True)
    if any(structure != structures[0] for structure in structures):
        raise ValueError("batches must be of one structure to be stacked, got several")
    tensors, others = [], {}
    for position, column in enumerate(zip(*leaves, strict=True)):
        if all(isinstance(leaf, Tensor) for leaf in column):
            if any(leaf.shape != column[0].shape or leaf.dtype != column[0].dtype for leaf in column):
                raise ValueError(f"batches must be of one shape to be stacked, got {[tuple(t.shape) for t in column]}")
            tensors.append(torch.stack(column))
        elif isinstance(column[0], (bool, int, float, str, type(None))) and all(leaf == column[0] for leaf in column):
            others[position] = column[0]
        else:
            raise ValueError(f"batches must differ in tensors alone to be stacked, got {type(column[0]).__name__}")
    if not tensors:
        raise ValueError("batches must hold a tensor to be stacked, got none")
    count = len(leaves[0])

    def rebuild(of_batch: Sequence[Tensor]) -> Any:
        rest = iter(of_batch)
        return tree_unflatten([others[i] if i in others else next(rest) for i in range(count)], structures[0])

    return tuple(tensors), rebuild


def single_samples(batch: Any, size: int) -> Stacked:
    """Return the samples of a batch, stacked, each as a batch of one.

    Args:
        batch: any collection: its tensors of ``size`` rows are cut, all else is that of every sample.
        size: number of samples.

    Raises:
        ValueError: if no tensor has as many rows.
    """
    leaves, structure = tree_flatten(batch)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == size]
    if not places:
        raise ValueError(f"a batch must hold a tensor with a row for each of its {size} samples, got none")

    def rebuild(of_sample: Sequence[Tensor]) -> Any:
        sample = list(leaves)
        for place, tensor in zip(places, of_sample, strict=True):
            sample[place] = tensor
        return tree_unflatten(sample, structure)

    return tuple(leaves[place].unsqueeze(1) for place in places), rebuild


def forward_operations(evaluate: Callable[[], object]) -> int:
    """Return the number of floating-point operations in matrix products and convolutions of one evaluation."""
    # As it will be differentiated: the counter does not see into compiled code.
    with torch.no_grad(), differentiable(), FlopCounterMode(display=False) as counter:
        evaluate()
    return counter.get_total_flops()
