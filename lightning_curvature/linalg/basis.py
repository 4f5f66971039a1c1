"""Orthonormal rows that grow one at a time."""

import torch
from torch import Tensor

from lightning_curvature.linalg.space import VectorSpace

# Memory is taken for this many rows at a time.
_BLOCK = 8
# Coordinates of all rows that are gathered at once when the rows are replaced by combinations of themselves.
_PIECE = 2**16


class Basis:
    """Orthonormal vectors v_1 … v_m as rows, in blocks of memory that are taken as they are needed.

    Args:
        space: the space they live in.
    """

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
        """The blocks from a row on, the last without its empty rows."""
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
        """Keep the first rows alone; their memory stays for the next ones."""
        self._count = count

    def coefficients(self, vector: Tensor, start: int = 0) -> Tensor:
        """Dot products with the rows from one on, (m − start,) float64."""
        return self.space.dots(self._filled(start), vector)

    def combine(self, coefficients: Tensor) -> Tensor:
        """Σ c_i v_i over the first rows, as many as there are coefficients."""
        total = self.space.zeros()
        for block, c in zip(self._filled(), coefficients.split(_BLOCK), strict=False):
            block = block[: len(c)]
            total.addmv_(block.T, c.to(block))
        return total

    def orthogonalize(self, vector: Tensor) -> Tensor:
        """Take the part along the rows out of a vector, in place; return its coefficients, (m,) float64.

        Classical Gram–Schmidt, twice: the second pass takes out what rounding left of the first ("twice is enough"),
        and both are matrix-vector products, where the modified form goes row by row.
        """
        total = torch.zeros(self._count, dtype=torch.float64, device=self.space.device)
        for _ in range(2 if self._count else 0):
            total += self._take_out(vector)
        return total

    def orthogonalize_known(self, vector: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """Orthogonalize a vector whose coefficients along the first rows are known, in place.

        Half the passes over the basis of :meth:`orthogonalize`: what is known, and the part along the other rows, is
        taken out first, so that one pass over all rows finds little more than rounding. Where it finds as much as it
        leaves, the vector lay within the rows, and one more pass is due.

        Args:
            vector: the vector.
            known: (l,) float64 on the CPU, mostly zeros.

        Returns:
            The coefficients of all rows, (m,) float64, and those of the last pass.
        """
        for block, part in zip(self._filled(), known.split(_BLOCK), strict=False):
            if part.any():
                vector.addmv_(block[: len(part)].T, part.to(block), alpha=-1.0)
        own = self._take_out(vector, len(known))
        last = self._take_out(vector)
        return torch.cat([known.to(own), own]) + last, last

    def _take_out(self, vector: Tensor, start: int = 0) -> Tensor:
        """Take the part along the rows from one on out of a vector, in place; its coefficients."""
        blocks, coefficients = self._filled(start), self.coefficients(vector, start)
        for block, part in zip(blocks, coefficients.split([len(block) for block in blocks]), strict=True):
            vector.addmv_(block.T, part.to(block), alpha=-1.0)
        return coefficients

    def replace(self, combinations: Tensor, tail: int) -> None:
        """Replace the first rows by combinations of themselves, and let the last ``tail`` rows follow them.

        Args:
            combinations: (m − tail, l) with orthonormal columns, l ≤ m − tail.
            tail: how many of the last rows stay as they are.
        """
        head, kept = combinations.shape
        assert head + tail == self._count
        for first in range(0, self.space.size, _PIECE):
            piece = slice(first, first + _PIECE)
            rows = torch.cat([block[:, piece] for block in self._filled()])
            rows = torch.cat([combinations.T.to(rows) @ rows[:head], rows[head:]])
            for block, new in zip(self._blocks, rows.split(_BLOCK), strict=False):
                block[: len(new), piece] = new
        self._count = kept + tail
