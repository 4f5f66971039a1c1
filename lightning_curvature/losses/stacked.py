"""Batches of one form, stacked, and copies of the parameters for each of them."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torch.utils.flop_counter import FlopCounterMode

from lightning_curvature.operators.differentiation import differentiable

# Tensors of batches of one form, stacked, and a function that makes one batch of a row of each.
Stacked = tuple[tuple[Tensor, ...], Callable[[Sequence[Tensor]], Any]]


def copies_of(parameters: Sequence[Tensor], count: int) -> list[Tensor]:
    """Return each parameter ``count`` times, (count, shape): leaves to differentiate by, which share its memory.

    The Hessian of losses of several mini-batches, each at its copy, has one block for each of them: one product
    multiplies a vector for each.
    """
    return [p.detach().expand(count, *p.shape).requires_grad_() for p in parameters]


def stack(batches: Sequence[Any]) -> Stacked:
    """Return the tensors of batches of one form, stacked, and a function that makes one batch of a row of each.

    Raises:
        ValueError: if they differ in structure, in shapes, or in anything that is no tensor; or hold none.
    """
    leaves, structures = zip(*map(tree_flatten, batches), strict=True)
    if any(structure != structures[0] for structure in structures):
        raise ValueError("batches must be of one structure to be stacked, got several")
    tensors: dict[int, Tensor] = {}
    for place, column in enumerate(zip(*leaves, strict=True)):
        if all(isinstance(leaf, Tensor) for leaf in column):
            if any(leaf.shape != column[0].shape or leaf.dtype != column[0].dtype for leaf in column):
                raise ValueError(f"batches must be of one shape to be stacked, got {[tuple(t.shape) for t in column]}")
            tensors[place] = torch.stack(column)
        elif not isinstance(column[0], (bool, int, float, str, type(None))) or any(
            leaf != column[0] for leaf in column
        ):
            raise ValueError(f"batches must differ in tensors alone to be stacked, got {type(column[0]).__name__}")
    if not tensors:
        raise ValueError("batches must hold a tensor to be stacked, got none")
    return tuple(tensors.values()), _rebuilder(leaves[0], structures[0], tensors)


def single_samples(batch: Any, size: int) -> Stacked:
    """Return the samples of a batch, stacked: each has one row of the tensors of ``size`` rows, and all else.

    Raises:
        ValueError: if no tensor has as many rows.
    """
    leaves, structure = tree_flatten(batch)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == size]
    if not places:
        raise ValueError(f"a batch must hold a tensor with a row for each of its {size} samples, got none")
    return tuple(leaves[place].unsqueeze(1) for place in places), _rebuilder(leaves, structure, places)


def _rebuilder(leaves: Sequence[Any], structure: TreeSpec, places: Iterable[int]) -> Callable[[Sequence[Tensor]], Any]:
    """A function that makes a batch of tensors for some places; other leaves stay."""
    rest, places = list(leaves), list(places)
    for place in places:
        rest[place] = None

    def rebuild(tensors: Sequence[Tensor]) -> Any:
        batch = list(rest)
        for place, tensor in zip(places, tensors, strict=True):
            batch[place] = tensor
        return tree_unflatten(batch, structure)

    return rebuild


def forward_operations(evaluate: Callable[[], object]) -> int:
    """Return the number of floating-point operations in matrix products and convolutions of one evaluation."""
    # As it will be differentiated: the counter does not see into compiled code.
    with torch.no_grad(), differentiable(), FlopCounterMode(display=False) as counter:
        evaluate()
    return counter.get_total_flops()
