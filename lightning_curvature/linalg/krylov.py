"""A growing orthonormal basis and the operator projected onto it: what Lanczos, trace and density share."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_curvature.linalg.basis import Basis
from lightning_curvature.linalg.space import VectorSpace

MatVec = Callable[[Tensor], Tensor]

# A remainder below this multiple of (machine epsilon × size of the operator) is rounding: the chain it would continue
# has ended in an invariant subspace. Two passes of Gram–Schmidt leave a few epsilons. Residuals are not asked to be
# smaller either.
_ROUNDING = 16.0


class NonFiniteProductError(ArithmeticError):
    """A product with the operator held a NaN or an infinity."""


def check_finite(numbers: Sequence[float], product: int) -> None:
    """Refuse a product, by its number, of which not all dot products are finite."""
    if not all(map(math.isfinite, numbers)):
        raise NonFiniteProductError(
            f"a product with the operator must be finite, got NaN or infinity in product {product}: look at the loss "
            "and its gradient there."
        )


class KrylovSpace:
    """Basis V, how many of its rows were multiplied, and T = VᵀAV.

    The first ``done`` rows have been multiplied by A; the rest wait. With full reorthogonalization
    A V_done = V T[:, :done] holds exactly up to rounding, for a start block of any size, for chains that end, for rows
    that are added later and after a restart. The residual of a Ritz pair of T[:done, :done] is then what T says of the
    waiting rows, and costs nothing.

    Args:
        matvec: v ↦ Av, in a new tensor.
        space: the space of v.

    Attributes:
        basis: V.
        projected: T, on the CPU.
        done: rows multiplied.
        matvecs: products made.
        restarts: times the basis was replaced by fewer vectors.
        scale: size of the operator as far as it was seen: largest entry of T.
        asymmetry: largest |v_i·Av_j − v_j·Av_i| seen: the noise of the products.
    """

    def __init__(self, matvec: MatVec, space: VectorSpace) -> None:
        self.matvec, self.space = matvec, space
        self.basis = Basis(space)
        self.projected = torch.zeros(0, 0, dtype=torch.float64)
        self.done = self.matvecs = self.restarts = 0
        self.asymmetry = self.scale = 0.0
        self._epsilon = _ROUNDING * torch.finfo(space.dtype).eps

    @property
    def rounding(self) -> float:
        """Smallest residual that means anything."""
        return self._epsilon * self.scale

    def add(self, vector: Tensor) -> bool:
        """Let a vector wait, made orthogonal to the basis; False where nothing is left of it."""
        vector = vector.clone()
        before = self.space.norm(vector)
        self.basis.orthogonalize(vector)
        norm = self.space.norm(vector)
        # Also false for NaN. A small remainder is mostly rounding: one more pass makes it orthogonal.
        if not norm > self._epsilon * before:
            return False
        self.basis.orthogonalize(vector.div_(norm))
        self._append(vector.div_(self.space.norm(vector)))
        return True

    def _append(self, vector: Tensor) -> None:
        self.basis.append(vector)
        grown = torch.zeros(len(self.basis), len(self.basis), dtype=torch.float64)
        grown[:-1, :-1] = self.projected
        self.projected = grown

    def step(self) -> None:
        """Multiply the first waiting row.

        Raises:
            NonFiniteProductError: if the product is not finite.
        """
        row = self.done
        # Worked on in place below: a copy, so that an operator may keep what it returned, or return what it got.
        vector = self.matvec(self.basis[row]).clone()
        self.matvecs += 1
        # A is symmetric: what it has along the rows before is known from their products.
        c, last = self.basis.orthogonalize_known(vector, self.projected[:row, row])
        # One transfer to the host, of a handful of numbers: whether to go on is decided there.
        norm_squared = self.space.squared_norm(vector)
        *coefficients, found, squared = torch.cat([c, last.square().sum().reshape(1), norm_squared]).tolist()
        check_finite((*coefficients, squared), self.matvecs)
        column = torch.tensor(coefficients, dtype=torch.float64)
        if found > squared:
            column += self.basis.orthogonalize(vector).cpu()
            squared = float(self.space.squared_norm(vector))
        difference = column[:row] - self.projected[:row, row]
        self.asymmetry = max([self.asymmetry, *difference.abs().tolist()])
        # The mean of the two measurements is the symmetric part.
        column[:row] -= difference / 2.0
        self.projected[:, row] = self.projected[row, :] = column
        remainder = math.sqrt(squared)
        self.scale = max([self.scale, remainder, *map(abs, coefficients)])
        self.done += 1
        if remainder > self.rounding and len(self.basis) < self.space.dimension:
            self._append(vector.div_(remainder))
            self.projected[-1, row] = self.projected[row, -1] = remainder

    def deflate(self, values: Tensor, vectors: Sequence[Tensor]) -> None:
        """Begin an empty basis with Ritz pairs of the same operator, which count as multiplied.

        The relation A V_done = V T holds up to their residuals; projections away from them are exact. A pair that is
        given twice, as the largest and the largest by magnitude may be one, counts once.
        """
        for value, vector in zip(values.tolist(), vectors, strict=True):
            remainder = vector.clone()
            self.basis.orthogonalize(remainder)
            norm = self.space.norm(remainder)
            # Ritz vectors of one basis are orthogonal or the same.
            if norm > 0.5:
                self._append(remainder.div_(norm))
                self.projected[-1, -1] = value
                self.done += 1
                self.scale = max(self.scale, abs(value))

    def drop_waiting(self) -> None:
        """Forget the rows that have not been multiplied."""
        self.basis.truncate(self.done)
        self.projected = self.projected[: self.done, : self.done].clone()

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ritz values in descending order, coordinates in the multiplied rows, couplings to the waiting ones.

        A product with a Ritz vector leaves the multiplied rows by its column of the couplings, (waiting rows, d): the
        norm of that is the residual.
        """
        square = self.projected[: self.done, : self.done]
        values, vectors = torch.linalg.eigh(square)
        values, vectors = values.flip(0), vectors.flip(1)
        return values, vectors, self.projected[self.done :, : self.done] @ vectors

    def restart(self, vectors: Tensor, values: Tensor) -> None:
        """Keep the given Ritz vectors, as columns, and the waiting rows."""
        waiting = len(self.basis) - self.done
        coupling = self.projected[self.done :, : self.done] @ vectors
        between = self.projected[self.done :, self.done :]
        self.basis.replace(vectors, waiting)
        self.projected = torch.cat(
            [torch.cat([torch.diag(values), coupling.T], dim=1), torch.cat([coupling, between], dim=1)]
        )
        self.done = len(values)
        self.restarts += 1
