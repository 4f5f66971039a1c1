"""Graphs of micro-batches, kept from product to product while they fit into memory."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor

from lightning_curvature.linalg import VectorSpace
from lightning_curvature.operators.memory import SavedBytes, available_memory, vectors_that_fit

KeepGraph = bool | Literal["auto"]
Graph = TypeVar("Graph")

# Share of the memory that is free when the first graph has been built that kept graphs may take: products need room
# for one more graph's worth of intermediate values, and the basis for its vectors.
_SHARE = 0.5


def check_keep_graph(keep: object) -> None:
    """Raise unless it says whether graphs are kept."""
    if keep not in (True, False, "auto"):
        raise ValueError(f"keep_graph must be True, False or 'auto', got {keep!r}: 'auto' keeps what fits.")


class Graphs(Generic[Graph]):
    """Graphs by index, built when they are first asked for.

    A graph that is kept spares every later product the forward and the first backward. ``"auto"`` keeps the first ones,
    as many as fit: the first is measured while it is built, by the bytes that autograd saves for it.

    Args:
        count: how many there are.
        keep: True, False or "auto".
        parameters: tensors that graphs share.
        processes: how many processes share the memory.
    """

    def __init__(self, count: int, keep: KeepGraph, parameters: Sequence[Tensor], processes: int = 1) -> None:
        check_keep_graph(keep)
        self._parameters, self._processes = parameters, processes
        self._kept: dict[int, Graph] = {}
        self._versions: list[int] = []
        # A single graph is alive during every product anyway.
        self._limit = count if keep is True or count == 1 else 0 if keep is False else None

    def keeps(self, index: int) -> bool:
        """Whether graph i stays, so that it must be retained."""
        return self._limit is None or index < self._limit

    def get(self, index: int, build: Callable[[int], Graph]) -> Graph:
        """Return graph i; ``build(i)`` makes it, where it is not kept or the parameters have changed since."""
        versions = [p._version for p in self._parameters]
        if versions != self._versions:
            self.clear()
            self._versions = versions
        if index in self._kept:
            return self._kept[index]
        if self._limit is None:
            saved = SavedBytes(self._parameters)
            with saved.counting():
                graph = build(index)
            free = available_memory(self._parameters[0].device, self._processes)
            # The first graph is already there: the share counts it as free memory that it took.
            self._limit = int(_SHARE * (free + saved.count) / max(saved.count, 1))
        else:
            graph = build(index)
        if index < self._limit:
            self._kept[index] = graph
        return graph

    def clear(self) -> None:
        """Let go of all of them."""
        self._kept.clear()


def differentiable_pairs(
    outputs: Sequence[Tensor | None], vectors: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Those outputs that have a graph, with their vectors in the type of the outputs."""
    found = [(o, v.to(o.dtype)) for o, v in zip(outputs, vectors, strict=True) if o is not None and o.requires_grad]
    return [o for o, _ in found], [v for _, v in found]


def pull_back(
    outputs: Sequence[Tensor | None],
    inputs: Sequence[Tensor],
    vectors: Sequence[Tensor],
    retain: bool,
    batched: bool = False,
) -> tuple[Tensor | None, ...]:
    """Vector–Jacobian product, or several by ``vmap``; None for inputs that the outputs do not depend on."""
    with_graph, cotangents = differentiable_pairs(outputs, vectors)
    if not with_graph:
        return (None,) * len(inputs)
    return torch.autograd.grad(
        with_graph, inputs, cotangents, retain_graph=retain, allow_unused=True, is_grads_batched=batched
    )


def pull_back_rows(output: Tensor, leaf: Tensor, rows: Tensor) -> Tensor | None:
    """Vector–Jacobian products of several rows: at once, or one by one where an operation has no batched rule.

    The graph is kept. None where the output does not depend on the leaf.
    """
    with contextlib.suppress(RuntimeError):
        return pull_back([output], [leaf], [rows], retain=True, batched=True)[0]
    found = [pull_back([output], [leaf], [row], retain=True)[0] for row in rows]
    return None if found[0] is None else torch.stack([one for one in found if one is not None])


# Share of the free memory that vectors multiplied at once may take: a product makes a few times as many intermediate
# values.
_BATCH_SHARE = 0.05


def products_at_once(space: VectorSpace, processes: int) -> int:
    """How many vectors are multiplied at once."""
    return max(1, int(vectors_that_fit(space, _BATCH_SHARE, processes)))


def products_with(
    gradients: Sequence[Tensor | None], parameters: Sequence[Tensor], space: VectorSpace, vectors: Tensor
) -> Tensor:
    """Products of the Hessian of one loss with several vectors, from the graph of its gradient: all at once, if may be.

    Args:
        gradients: of the loss, with their graph, which is kept.
        parameters: that it was differentiated by.
        space: of the vectors.
        vectors: (q, n).

    Returns:
        (q, n).
    """

    def pulled(rows: Tensor, batched: bool) -> Tensor:
        found = pull_back(gradients, parameters, space.views(rows), retain=True, batched=batched)
        return space.pack(found, *rows.shape[:-1])

    if len(vectors) > 1:
        with contextlib.suppress(RuntimeError):  # an operation that cannot be batched
            return pulled(vectors, True)
    return torch.stack([pulled(row, False) for row in vectors])
