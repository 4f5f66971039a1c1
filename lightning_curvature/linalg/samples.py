"""Samples of a trace: their estimate, its standard error, and both for diagonal blocks."""

import math
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_curvature.linalg.krylov import KrylovSpace, check_finite

# The spread of n samples of a remainder with k equal eigenvalues is known as that of nk numbers. Sampling ends where it
# seems small, and values and spreads are small together: of few samples the variance is raised by 60/n²k, with which
# two standard errors hold in nine of ten cases (docs/calibration_trace.md). From n = 15 on Student's 4/nk is more.
_FEW_SAMPLES = 60.0


@dataclass
class _Sample:
    """A random unit vector w orthogonal to the basis, Aw, Bw and ‖Bw‖²."""

    vector: Tensor
    product: Tensor
    remainder: Tensor
    square: float


class TraceSamples:
    """Samples of tr B = m E[wᵀBw] for the multiplied rows Q of a basis; the last few can follow Q when it grows.

    Attributes:
        count: number of samples.
        forms: sum of wᵀBw.
        squares: sum of ‖Bw‖².
    """

    def __init__(self, krylov: KrylovSpace, keep: int, labels: Tensor | None = None) -> None:
        self._krylov, self._space, self._basis = krylov, krylov.space, krylov.basis
        self._labels, blocks = labels, 0 if labels is None else int(labels.max()) + 1
        self._no_blocks = torch.zeros(blocks, dtype=torch.float64, device=krylov.space.device)
        self.kept: deque[_Sample] = deque(maxlen=keep)
        self._clear()

    def _clear(self) -> None:
        self.count, self.forms, self.squares = 0, 0.0, 0.0
        self._cosines, self._pairs = 0.0, 0
        # Sums of wᵀP_b y and ‖P_b y‖², y = (2A − B)w, by block.
        self._block_forms = self._block_squares = self._no_blocks

    @property
    def left(self) -> int:
        """Dimension m of the space of w."""
        return self._space.dimension - self._krylov.done

    @property
    def dominant(self) -> float:
        """Number of equal eigenvalues that would make up the spread: the squared cosine of Bw and Bw' is 1/k."""
        return min(self._pairs / self._cosines, self.left) if self._cosines else float(self.left if self._pairs else 1)

    def draw(self, generator: torch.Generator) -> None:
        """Add a sample. One product."""
        w = self._space.random(generator)
        self._basis.orthogonalize(w)
        w /= self._space.norm(w)
        product = self._krylov.matvec(w).clone()
        self._krylov.matvecs += 1
        remainder = product.clone()
        self._basis.orthogonalize(remainder)
        self._add(w, product, remainder)

    def follow(self) -> None:
        """Take the row q that was multiplied last out of the samples that were kept, and forget the others.

        w' = w − qqᵀw, Aw' = Aw − Aq qᵀw, and Bw' is Bw without its part along q, and without the part of Aq qᵀw that is
        outside the basis: the row that waits.
        """
        row = self._krylov.done - 1
        q, coefficients = self._basis[row], self._krylov.projected[:, row]
        product = self._basis.combine(coefficients)
        kept = list(self.kept)
        self.kept.clear()
        self._clear()
        for sample in kept:
            along = self._space.dot(q, sample.vector)
            sample.remainder.sub_(q, alpha=self._space.dot(q, sample.remainder))
            for waiting in range(row + 1, len(self._basis)):
                sample.remainder.sub_(self._basis[waiting], alpha=along * float(coefficients[waiting]))
            sample.vector.sub_(q, alpha=along)
            sample.product.sub_(product, alpha=along)
            norm = self._space.norm(sample.vector)
            self._add(*(tensor.div_(norm) for tensor in (sample.vector, sample.product, sample.remainder)))

    def _add(self, vector: Tensor, product: Tensor, remainder: Tensor) -> None:
        others = [other.remainder.unsqueeze(0) for other in self.kept]
        form, square, *mixed = self._space.dots(
            [vector.unsqueeze(0), remainder.unsqueeze(0), *others], remainder
        ).tolist()
        check_finite((form, square), self._krylov.matvecs)
        for other, dot in zip(self.kept, mixed, strict=True):
            if squares := square * other.square:
                self._cosines += dot**2 / squares
            self._pairs += 1
        self.count += 1
        self.forms += form
        self.squares += square
        if self._labels is not None:
            y = torch.sub(product, remainder, alpha=0.5).mul_(2.0)
            self._block_forms = self._block_forms + self._dots_by_block(vector, y)
            self._block_squares = self._block_squares + self._dots_by_block(y, y)
        self.kept.append(_Sample(vector, product, remainder, square))

    def estimate(self) -> tuple[float, float]:
        """Return the trace and its standard error."""
        known, left, count = float(self._krylov.projected.trace()), self.left, self.count
        if not left:
            return known, 0.0
        # ‖Bw‖² ≥ (wᵀBw)²: only rounding makes the difference of the means negative.
        spread = max(self.squares / count - (self.forms / count) ** 2, 0.0)
        spread *= self._caution
        return known + left * self.forms / count, left * math.sqrt(2.0 / (left + 2) * spread / count)

    def by_block(self) -> tuple[Tensor, Tensor]:
        """Return the traces of the blocks, and their standard errors."""
        left, count, rows = self.left, self.count, range(self._krylov.done)
        projected = self._krylov.projected[: len(rows), : len(rows)]
        known = self._no_blocks
        for row in rows:
            known = known + self._dots_by_block(self._basis[row], self._basis.combine(projected[:, row]))
        if not left:
            return known.cpu(), self._no_blocks.cpu()
        means, squares = self._block_forms / count, self._block_squares / count
        # Var[wᵀKw] is ‖K‖² + tr K² but for constants, and at most twice the first: off-diagonal blocks are in it alone.
        spreads = (squares - means.square()).clamp(min=0.0) * self._caution
        return (known + left * means).cpu(), (left * (2.0 / (left + 2) * spreads / count).sqrt()).cpu()

    @property
    def _caution(self) -> float:
        return 1.0 + _FEW_SAMPLES / (self.count**2 * self.dominant)

    def _dots_by_block(self, a: Tensor, b: Tensor) -> Tensor:
        assert self._labels is not None
        return self._no_blocks.index_add(0, self._labels, self._space.dots_by_tensor(a, b))
