"""A growing orthonormal basis and the operator projected onto it, shared by Lanczos, trace and density."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_curvature.arguments import checked
from lightning_curvature.linalg.basis import Basis
from lightning_curvature.linalg.space import VectorSpace

MatVec = Callable[[Tensor], Tensor]

# A remainder below this multiple of (machine epsilon × size of the operator) is rounding, of which two passes of
# Gram–Schmidt leave a few epsilons: the chain has ended in an invariant subspace. Residuals need not be smaller.
_ROUNDING = 16.0


class NonFiniteProductError(ArithmeticError):
    """A product with the operator contains a NaN or an infinity."""


def check_finite(numbers: Sequence[float], product: int) -> None:
    """Raise unless all dot products with a product are finite; ``product`` is its number."""
    if not all(map(math.isfinite, numbers)):
        raise NonFiniteProductError(
            f"a product with the operator must be finite, got NaN or infinity in product {product}: look at the loss "
            "and its gradient there."
        )


class KrylovSpace:
    """Basis V, the number of its multiplied rows, and T = VᵀAV.

    The first ``done`` rows have been multiplied by A; the others wait. With full reorthogonalization,
    A V_done = V T[:, :done] holds up to rounding, for a start block of any size, for chains that end, for rows that are
    added later and after a restart. The waiting rows of T then give the residual of a Ritz pair of T[:done, :done],
    without a product.

    Attributes:
        basis: V.
        projected: T, on the CPU.
        done: rows multiplied.
        restarts: how often the basis was replaced by fewer vectors.
        scale: largest entry of T, an estimate of the size of the operator.
        asymmetry: largest ``|v_i·Av_j − v_j·Av_i|`` so far: the noise of the products.
    """

    @checked()
    def __init__(self, matvec: MatVec, space: VectorSpace) -> None:
        self.matvec, self.space = matvec, space
        self.basis = Basis(space)
        self.projected = torch.zeros(0, 0, dtype=torch.float64)
        self.done = self.matvecs = self.restarts = 0
        self.asymmetry = self.scale = 0.0
        self._epsilon = _ROUNDING * torch.finfo(space.dtype).eps

    @property
    def rounding(self) -> float:
        """Smallest residual that rounding can resolve."""
        return self._epsilon * self.scale

    def add(self, vector: Tensor) -> bool:
        """Add a waiting row, made orthogonal to the basis; return False if nothing is left of it."""
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
        self.projected = torch.nn.functional.pad(self.projected, (0, 1, 0, 1))

    def step(self) -> None:
        """Multiply the first waiting row.

        Raises:
            NonFiniteProductError: if the product is not finite.
        """
        row = self.done
        # A copy, because it is changed in place below: the operator may keep its result, or return its argument.
        vector = self.matvec(self.basis[row]).clone()
        self.matvecs += 1
        # A is symmetric: the products with the earlier rows give the components of this one along them.
        c, last = self.basis.orthogonalize_known(vector, self.projected[:row, row])
        # One transfer of a few numbers to the host, which decides whether to go on.
        norm_squared = self.space.squared_norm(vector)
        *coefficients, removed, squared = torch.cat([c, last.square().sum().reshape(1), norm_squared]).tolist()
        check_finite((*coefficients, squared), self.matvecs)
        column = torch.tensor(coefficients, dtype=torch.float64)
        if removed > squared:
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

        A V_done = V T holds up to their residuals. A pair given twice (largest, and by magnitude) counts once.
        """
        for value, vector in zip(values.tolist(), vectors, strict=True):
            remainder = vector.clone()
            self.basis.orthogonalize(remainder)
            norm = self.space.norm(remainder)
            # Ritz vectors of one basis are either orthogonal or identical.
            if norm > 0.5:
                self._append(remainder.div_(norm))
                self.projected[-1, -1] = value
                self.done += 1
                self.scale = max(self.scale, abs(value))

    def drop_waiting(self) -> None:
        """Remove the rows that have not been multiplied."""
        self.basis.truncate(self.done)
        self.projected = self.projected[: self.done, : self.done].clone()

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return Ritz values, descending, their vectors in coordinates of the multiplied rows, and their couplings.

        Couplings, (waiting rows, d), are the part of A times the vectors outside these rows: their norms are residuals.
        """
        values, vectors = torch.linalg.eigh(self.projected[: self.done, : self.done])
        values, vectors = values.flip(0), vectors.flip(1)
        return values, vectors, self.projected[self.done :, : self.done] @ vectors

    def restart(self, vectors: Tensor, values: Tensor) -> None:
        """Keep the given Ritz vectors, as columns, and the waiting rows."""
        coupling = self.projected[self.done :, : self.done] @ vectors
        between = self.projected[self.done :, self.done :]
        self.basis.replace(vectors, len(self.basis) - self.done)
        self.projected = torch.cat(
            [torch.cat([torch.diag(values), coupling.T], dim=1), torch.cat([coupling, between], dim=1)]
        )
        self.done = len(values)
        self.restarts += 1
