"""Graphs of micro-batches, kept from product to product while they fit into memory, and products by them."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor

from lightning_curvature.linalg import VectorSpace
from lightning_curvature.operators.memory import SavedBytes, available_memory, vectors_that_fit

KeepGraph = bool | Literal["auto"]
Graph = TypeVar("Graph")

# Share of the memory that is free without graphs for all that are kept: products need room for the intermediate values
# of one more graph, and the basis for its vectors.
_SHARE = 0.5
# Share of the free memory for vectors that are multiplied at once: a product makes a few times as many temporaries.
_BATCH_SHARE = 0.05


class Graphs(Generic[Graph]):
    """Graphs by index, each built when it is first used.

    A kept graph saves every later product the forward and the first backward. ``"auto"`` keeps those that fit, in
    order, into half of the memory that is free before the first is built: the bytes of each are counted while it is
    built. Products are the same either way, so that ranks need not agree. All graphs share the ``parameters``, and
    ``processes`` share the memory.
    """

    def __init__(self, count: int, keep: KeepGraph, parameters: Sequence[Tensor], processes: int = 1) -> None:
        self._count, self._parameters, self._processes = count, parameters, processes
        # A single graph is alive during every product anyway.
        self._keep = keep or count == 1
        self._auto = keep == "auto" and count > 1
        self._kept: dict[int, Graph] = {}
        self._too_large: set[int] = set()
        self._versions: list[int] = []
        self._budget: int | None = None
        self._used = 0

    def keeps(self, index: int) -> bool:
        """Return whether graph i, which was built, is kept, so that it must be retained."""
        return index in self._kept

    @property
    def left_out(self) -> str:
        """Which graphs do not fit into the memory, in one sentence; empty where all do."""
        if not self._too_large or self._budget is None:
            return ""
        return (
            f"keep_graph='auto' keeps the gradient graphs of {len(self._kept)} of {self._count} micro-batches, "
            f"{self._used / 2**20:,.0f} MiB within half of the free memory ({self._budget / 2**20:,.0f} MiB): every "
            "product repeats a forward and a backward of the others. Fewer probe_samples make room."
        )

    def get(self, index: int, build: Callable[[int], Graph]) -> Graph:
        """Return graph i, from ``build(i)`` unless it is kept and the parameters have not changed since."""
        versions = [p._version for p in self._parameters]
        if versions != self._versions:
            self.clear()
            self._versions = versions
        if index in self._kept:
            return self._kept[index]
        counts = self._auto and index not in self._too_large
        graph = self._counted(index, build) if counts else build(index)
        if self._keep and index not in self._too_large:
            self._kept[index] = graph
        return graph

    def _counted(self, index: int, build: Callable[[int], Graph]) -> Graph:
        """Build graph i, and find out whether it fits."""
        saved = SavedBytes(self._parameters)
        with saved.counting():
            graph = build(index)
        saved.add(graph)
        if self._budget is None:
            # The first graph is already allocated: its bytes count as free memory.
            free = available_memory(self._parameters[0].device, self._processes)
            self._budget = int(_SHARE * (free + saved.count))
        if self._used + saved.count <= self._budget:
            self._used += saved.count
        else:
            self._too_large.add(index)
        return graph

    def clear(self) -> None:
        """Release all graphs."""
        self._kept.clear()
        self._too_large.clear()
        self._budget, self._used = None, 0


def pull_back(
    outputs: Sequence[Tensor | None],
    inputs: Sequence[Tensor],
    vectors: Sequence[Tensor],
    retain: bool,
    batched: bool = False,
) -> tuple[Tensor | None, ...]:
    """Return a vector–Jacobian product, or several by ``vmap``; None for inputs that the outputs do not depend on."""
    pairs = [(o, v.to(o.dtype)) for o, v in zip(outputs, vectors, strict=True) if o is not None and o.requires_grad]
    if not pairs:
        return (None,) * len(inputs)
    with_graph, cotangents = zip(*pairs, strict=True)
    return torch.autograd.grad(
        with_graph, inputs, cotangents, retain_graph=retain, allow_unused=True, is_grads_batched=batched
    )


def _pull_back_each(
    outputs: Sequence[Tensor | None], inputs: Sequence[Tensor], rows: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """Return products for q rows, (q, shape) each, and keep the graph: batched where supported, else one by one."""
    if len(rows[0]) > 1:
        with contextlib.suppress(RuntimeError):  # from an operation without a batching rule
            return pull_back(outputs, inputs, rows, retain=True, batched=True)
    products = [pull_back(outputs, inputs, row, retain=True) for row in zip(*rows, strict=True)]
    columns = [[one for one in column if one is not None] for column in zip(*products, strict=True)]
    return tuple(torch.stack(column) if column else None for column in columns)


def pull_back_rows(output: Tensor, leaf: Tensor, rows: Tensor) -> Tensor | None:
    """Return the vector–Jacobian products of q rows, (q, …), or None without dependence; the graph is kept."""
    return _pull_back_each([output], [leaf], [rows])[0]


def products_at_once(space: VectorSpace, processes: int) -> int:
    """Return how many vectors fit into memory when they are multiplied at once."""
    return max(1, int(vectors_that_fit(space, _BATCH_SHARE, processes)))


def products_with(
    gradients: Sequence[Tensor | None], parameters: Sequence[Tensor], space: VectorSpace, vectors: Tensor
) -> Tensor:
    """Return products of the Hessian of one loss with vectors, (q, n), from its gradients, whose graph is kept."""
    return space.pack(_pull_back_each(gradients, parameters, space.views(vectors)), len(vectors))
