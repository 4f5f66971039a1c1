"""Vectors with the structure of a list of tensors, kept flat: all that the algorithms know of a model."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_curvature.arguments import Rule, checked, sentence

# Dot products are taken over pieces of so many coordinates in the type of the vectors, and summed in float64: their
# rounding is that of one piece. On a CPU it stays in the cache; on an accelerator one kernel is worth its launch.
PIECE, _ACCELERATOR_PIECE = 2**16, 2**24

Reduce = Callable[[Tensor], Tensor]
Cut = Callable[[Tensor], Tensor]
Distribution = Literal["normal", "rademacher"]

_TENSORS = Rule("give the parameters that are trained")
_SHARES = Rule("1 is a coordinate on one rank", least=0.0, empty=True)
_FUNCTIONS = Rule("give one for each tensor", empty=True)


class VectorSpace:
    r"""The space in which a list of tensors is one vector of N coordinates.

    A vector is a flat tensor of this rank's coordinates, (n,), so that a dot product and a linear combination of many
    vectors are one operation each; :meth:`views` gives it the shapes of the list, without a copy. Its type is that of
    the tensors, float32 at least.

    Where each rank holds only some coordinates, ``reduce`` sums over the ranks and ``shares`` weighs coordinates that
    several ranks hold (1 for a coordinate on one rank, 1/ranks for a replica):

    .. math:: \langle a, b\rangle = \sum_{\text{ranks}} \sum_i s_i\, a_i b_i .

    Args:
        tensors: the list; this rank's shard of each tensor.
        reduce: sum over the ranks of a small float64 tensor; None where every rank holds all coordinates.
        shares: s of each tensor; used only with ``reduce``.
        shapes: full shapes, where ``tensors`` are shards: random vectors are drawn in them and cut.
        cut: one function for each tensor, from a full tensor to this rank's shard.

    Attributes:
        device: device of the vectors, that of the first tensor.
        size: n, coordinates on this rank.
        sizes: of the tensors, on this rank.
        dimension: N, coordinates in all.

    Raises:
        ValueError: if the list is empty.

    Example:
        >>> space = VectorSpace([torch.zeros(2, 2), torch.zeros(3)])
        >>> v = space.pack([torch.ones(2, 2), torch.arange(3.0)])
        >>> space.dimension, space.norm(v)
        (7, 3.0)
        >>> [tuple(view.shape) for view in space.views(v)]
        [(2, 2), (3,)]
    """

    @checked(tensors=_TENSORS, shares=_SHARES, shapes=_FUNCTIONS, cut=_FUNCTIONS)
    def __init__(
        self,
        tensors: Sequence[Tensor],
        *,
        reduce: Reduce | None = None,
        shares: Sequence[float] = (),
        shapes: Sequence[torch.Size] = (),
        cut: Sequence[Cut] = (),
    ) -> None:
        for name, given in (("shares", shares), ("shapes", shapes), ("cut", cut)):
            if len(given) != len(tensors) and (given or (name == "shares" and reduce is not None)):
                raise sentence(name, "hold one for each tensor", f"{len(given)} for {len(tensors)}", "leave none out")
        self.device = tensors[0].device
        self.dtype = functools.reduce(torch.promote_types, [tensor.dtype for tensor in tensors], torch.float32)
        self._shapes = [tensor.shape for tensor in tensors]
        self.sizes = [tensor.numel() for tensor in tensors]
        self.size = sum(self.sizes)
        self._full_shapes, self._cut, self._reduce = list(shapes) or self._shapes, list(cut), reduce
        self._shares = list(shares) if reduce is not None else [1.0] * len(tensors)
        self._segments = _segments(self.sizes, self._shares)
        count = torch.tensor(sum(s * (stop - start) for start, stop, s in self._segments), dtype=torch.float64)
        self.dimension = round(float(self._summed(count.to(self.device))))

    def _summed(self, values: Tensor) -> Tensor:
        return values if self._reduce is None else self._reduce(values)

    def zeros(self, *rows: int) -> Tensor:
        """Return a zero vector, or (rows, n) of them."""
        return torch.zeros(*rows, self.size, dtype=self.dtype, device=self.device)

    def check(self, vector: Tensor) -> None:
        """Raise ValueError unless a vector is one of the space."""
        if isinstance(vector, Tensor) and vector.shape == (self.size,) and vector.is_floating_point():
            return
        found = f"{tuple(vector.shape)} of {vector.dtype}" if isinstance(vector, Tensor) else type(vector).__name__
        raise sentence("vector", f"be ({self.size},), of real numbers", found, "pack() makes one of a list of tensors")

    def views(self, vector: Tensor) -> list[Tensor]:
        """Return the vector, (…, n), as the list of tensors, (…, shape); they share its memory."""
        pieces = vector.split(self.sizes, dim=-1)
        return [piece.reshape((*vector.shape[:-1], *shape)) for piece, shape in zip(pieces, self._shapes, strict=True)]

    def pack(self, tensors: Sequence[Tensor | None], *rows: int) -> Tensor:
        """Return a list of tensors, (rows, shape), as one vector, (rows, n), in new memory; None stands for zeros."""
        pieces = [
            torch.zeros(*rows, size, dtype=self.dtype, device=self.device)
            if tensor is None
            else tensor.detach().reshape(*rows, size).to(self.device, self.dtype)
            for tensor, size in zip(tensors, self.sizes, strict=True)
        ]
        return torch.cat(pieces, dim=-1)

    def add_(self, vector: Tensor, tensors: Sequence[Tensor | None], factor: float) -> Tensor:
        """Add a multiple of a list of tensors to a vector in place; None stands for zeros."""
        for view, tensor in zip(self.views(vector), tensors, strict=True):
            if tensor is not None:
                view.add_(tensor.detach().to(self.device, self.dtype), alpha=factor)
        return vector

    @checked()
    def random(self, generator: torch.Generator, distribution: Distribution = "normal") -> Tensor:
        """Return a vector of independent coordinates, mean 0, variance 1.

        Each tensor is drawn in its full shape, so that the vector does not depend on the sharding; the generator must
        be in the same state on every rank.
        """
        vector = self.zeros()
        for index, (view, shape) in enumerate(zip(self.views(vector), self._full_shapes, strict=True)):
            full = torch.empty(shape, dtype=self.dtype, device=self.device)
            if distribution == "normal":
                full.normal_(generator=generator)
            else:
                full.bernoulli_(0.5, generator=generator).mul_(2.0).sub_(1.0)
            view.copy_(self._cut[index](full) if self._cut else full)
        return vector

    def dots(self, blocks: Sequence[Tensor], vector: Tensor) -> Tensor:
        """Return the dot products of a vector with the rows of all blocks (m, n), float64; one reduction."""
        totals = []
        for rows in blocks:
            total = torch.zeros(len(rows), dtype=torch.float64, device=self.device)
            for first, last, share in self._pieces():
                total += share * (rows[:, first:last] @ vector[first:last]).double()
            totals.append(total)
        return self._summed(torch.cat(totals))

    def dot(self, a: Tensor, b: Tensor) -> float:
        """Return the dot product of two vectors."""
        return float(self.dots([a.unsqueeze(0)], b))

    def dots_by_tensor(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the dot products of two vectors over each tensor of the list, (tensors,) float64; one reduction."""
        totals = torch.zeros(len(self.sizes), dtype=torch.float64, device=self.device)
        for index, parts in enumerate(zip(a.split(self.sizes), b.split(self.sizes), strict=True)):
            for x, y in zip(*(part.split(self._piece) for part in parts), strict=True):
                totals[index] += self._shares[index] * torch.dot(x, y)
        return self._summed(totals)

    def squared_norm(self, vector: Tensor) -> Tensor:
        """Return the squared norm, (1,) float64; squares of float32 numbers can leave its range."""
        total = torch.zeros(1, dtype=torch.float64, device=self.device)
        for first, last, share in self._pieces():
            piece = vector[first:last].double()
            total += share * torch.dot(piece, piece)
        return self._summed(total)

    def norm(self, vector: Tensor) -> float:
        """Return the Euclidean norm."""
        return float(self.squared_norm(vector)) ** 0.5

    def _pieces(self) -> Iterator[tuple[int, int, float]]:
        """Yield start, stop and share of the coordinates that one operation sums."""
        for start, stop, share in self._segments:
            for first in range(start, stop, self._piece):
                yield first, min(first + self._piece, stop), share

    @property
    def _piece(self) -> int:
        return PIECE if self.device.type == "cpu" else _ACCELERATOR_PIECE


def _segments(sizes: Sequence[int], shares: Sequence[float]) -> list[tuple[int, int, float]]:
    """Return runs of coordinates with one share: start, stop, share."""
    bounds = [0, *itertools.accumulate(sizes)]
    spans = zip(itertools.pairwise(bounds), shares, strict=True)
    runs = [(share, [span for span, _ in run]) for share, run in itertools.groupby(spans, key=lambda pair: pair[1])]
    return [(run[0][0], run[-1][1], share) for share, run in runs]


def pairwise_dots(a: Tensor, b: Tensor) -> Tensor:
    """Return the dot products of the rows of a (A, n) and b (B, n), (A, B) float64, summed in float64 over pieces."""
    total = torch.zeros(len(a), len(b), dtype=torch.float64, device=a.device)
    for first in range(0, a.shape[1], PIECE):
        total += (a[:, first : first + PIECE] @ b[:, first : first + PIECE].mT).double()
    return total
