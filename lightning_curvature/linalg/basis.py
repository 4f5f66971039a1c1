"""Orthonormal rows that grow one at a time."""

import torch
from torch import Tensor

from lightning_curvature.linalg.space import PIECE, VectorSpace

# Rows for which memory is allocated at once.
_BLOCK = 8


class Basis:
    """Orthonormal vectors v_1 … v_m of a space as rows, in blocks of memory that are allocated when they are needed."""

    def __init__(self, space: VectorSpace) -> None:
        self.space = space
        self._blocks: list[Tensor] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < self._count:
            raise IndexError(index)
        return self._blocks[index // _BLOCK][index % _BLOCK]

    def _filled(self, start: int = 0) -> list[Tensor]:
        """Return the blocks from row ``start`` on, the last without its empty rows."""
        return [
            block[max(start - first, 0) : min(_BLOCK, self._count - first)]
            for first, block in zip(range(0, self._count, _BLOCK), self._blocks, strict=False)
            if start < first + _BLOCK
        ]

    def append(self, vector: Tensor) -> None:
        """Add a unit vector that is orthogonal to all rows, as :meth:`orthogonalize` leaves it."""
        if self._count == len(self._blocks) * _BLOCK:
            self._blocks.append(torch.empty(_BLOCK, self.space.size, dtype=self.space.dtype, device=self.space.device))
        self._count += 1
        self[self._count - 1].copy_(vector)

    def truncate(self, count: int) -> None:
        """Keep the first ``count`` rows; later rows reuse the memory of the others."""
        self._count = count

    def combine(self, coefficients: Tensor) -> Tensor:
        """Return Σ c_i v_i over the first rows, one for each coefficient."""
        total = self.space.zeros()
        for block, c in zip(self._filled(), coefficients.split(_BLOCK), strict=False):
            total.addmv_(block[: len(c)].T, c.to(block))
        return total

    def orthogonalize(self, vector: Tensor) -> Tensor:
        """Subtract the projection onto the rows from a vector, in place; return its coefficients, (m,) float64."""
        # Classical Gram–Schmidt, twice ("twice is enough"): both passes are matrix-vector products.
        total = torch.zeros(self._count, dtype=torch.float64, device=self.space.device)
        for _ in range(2 if self._count else 0):
            total += self._subtract_projection(vector)
        return total

    def orthogonalize_known(self, vector: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """Orthogonalize a vector, in place; return its coefficients, (m,) float64, and those of the last pass.

        Takes half the passes of :meth:`orthogonalize`: the ``known`` coefficients along the first rows, (l,) float64 on
        the CPU, and then those along the other rows are subtracted, so that the one pass over all rows removes hardly
        anything but rounding. Where it removes as much as it leaves, the vector lay in the rows and needs another pass.
        """
        for block, part in zip(self._filled(), known.split(_BLOCK), strict=False):
            if part.any():
                vector.addmv_(block[: len(part)].T, part.to(block), alpha=-1.0)
        others = self._subtract_projection(vector, len(known))
        last = self._subtract_projection(vector)
        return torch.cat([known.to(others), others]) + last, last

    def _subtract_projection(self, vector: Tensor, start: int = 0) -> Tensor:
        """Subtract the projection onto the rows from ``start`` on, in place; return its coefficients."""
        blocks = self._filled(start)
        coefficients = self.space.dots(blocks, vector)
        for block, part in zip(blocks, coefficients.split([len(block) for block in blocks]), strict=True):
            vector.addmv_(block.T, part.to(block), alpha=-1.0)
        return coefficients

    def replace(self, combinations: Tensor, tail: int) -> None:
        """Replace the first m − tail rows by orthonormal combinations of them, (m − tail, l); the last rows stay."""
        head, kept = combinations.shape
        assert head + tail == self._count
        for first in range(0, self.space.size, PIECE):
            piece = slice(first, first + PIECE)
            rows = torch.cat([block[:, piece] for block in self._filled()])
            rows = torch.cat([combinations.T.to(rows) @ rows[:head], rows[head:]])
            for block, new in zip(self._blocks, rows.split(_BLOCK), strict=False):
                block[: len(new), piece] = new
        self._count = kept + tail
