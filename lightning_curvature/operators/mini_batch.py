"""Gradients of mini-batches, and the curvature of their losses along vectors."""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from lightning_curvature.arguments import checked
from lightning_curvature.linalg import Eigenpairs, eigenpairs
from lightning_curvature.operators.base import CurvatureOperator

# Products with vectors of a squared norm between this and its inverse stay in the range of float32 (1e-38); other
# vectors are scaled to unit length first, which takes one more pass over memory.
_LEAST = 1e-16


class MiniBatch:
    """Gradient and curvatures of one mini-batch, each computed when it is first used.

    Where the operator keeps its graph, the gradient and all products take one forward. Use with ``contextlib.closing``.

    Args:
        operator: products with the curvature of the mini-batch's loss, summed over all ranks that hold its samples.

    Source: Edge of stochastic stability (2025), definition 3.

    Example:
        >>> import torch
        >>> from contextlib import closing
        >>> from lightning_curvature.operators import HessianOperator
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> data = [(torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1))]
        >>> with closing(MiniBatch(HessianOperator.of(model, torch.nn.functional.mse_loss, data))) as batch:
        ...     round(batch.self_curvature / batch.squared_norm, 4)  # H = 2 E x²
        10.0
    """

    @checked()
    def __init__(self, operator: CurvatureOperator) -> None:
        self.operator = operator

    @cached_property
    def gradient(self) -> Tensor:
        """g, a vector of the operator's space."""
        return self.operator.gradient()

    @cached_property
    def squared_norm(self) -> float:
        """‖g‖²."""
        return float(self.operator.space.squared_norm(self.gradient))

    @property
    def self_curvature(self) -> float:
        """Curvature along its gradient, gᵀAg; one product."""
        return float(self.self_terms.sum())

    @cached_property
    def self_terms(self) -> Tensor:
        """Its terms by parameter, gᵢ·(Ag)ᵢ, (parameters,) float64."""
        return self._terms_along(self.gradient, self.squared_norm)

    def curvature_along(self, vector: Tensor) -> float:
        """Return vᵀAv; one product, none for a vector of zeros."""
        self.operator.space.check(vector)
        return float(self._terms_along(vector, float(self.operator.space.squared_norm(vector))).sum())

    def largest_eigenvalue(self, tolerance: float, start: Sequence[Tensor]) -> tuple[float, Eigenpairs | None]:
        """Return λ_max to a relative residual, and the search; None for one parameter, which needs no search."""
        space = self.operator.space
        if space.dimension == 1:
            return self.curvature_along(space.zeros() + 1.0), None
        pairs = eigenpairs(self.operator, space, largest=1, tolerance=tolerance, start=start)
        return float(pairs.values[0]), pairs

    def _terms_along(self, vector: Tensor, square: float) -> Tensor:
        if square == 0.0:
            return torch.zeros(len(self.operator.parameters), dtype=torch.float64)
        if _LEAST < square < 1.0 / _LEAST:
            return self.operator.form_terms(vector)
        return square * self.operator.form_terms(vector / square**0.5)

    def close(self) -> None:
        """Release the graphs."""
        self.operator.close()
