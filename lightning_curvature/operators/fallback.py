"""Products with the Hessian, exact where second derivatives are there."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_curvature.distributed.together import lacks_derivatives
from lightning_curvature.linalg.space import Reduce
from lightning_curvature.operators.base import CurvatureOperator
from lightning_curvature.operators.differences import DifferenceHistory, GradientDifferenceOperator
from lightning_curvature.operators.exact import HessianOperator
from lightning_curvature.operators.micro_batches import MicroBatch
from lightning_curvature.reporting.loggers import warn


@dataclass
class SecondDerivatives:
    """What a fit has learned of the second derivatives of its loss on this rank.

    Attributes:
        missing: whether products are differences of gradients.
        history: of these differences.
    """

    missing: bool = False
    history: DifferenceHistory = field(default_factory=DifferenceHistory)

    def lack(self, error: Exception) -> None:
        """Take differences from here on, and say so."""
        self.missing = True
        warn(f"{BY_DIFFERENCES} {error}")


BY_DIFFERENCES = (
    "products with the Hessian are differences of gradients from here on, since second derivatives are missing:"
)


class FallbackOperator(CurvatureOperator):
    """Products with the Hessian by double backward, or by differences where a loss cannot be differentiated twice.

    Ranks decide each for itself: their terms are the same by both ways.

    Args:
        parts, parameters, reduce: see :class:`~.base.CurvatureOperator`.
        second: what is known of the loss already.
        processes: number of processes that share the memory.
        **options: of :class:`~.exact.HessianOperator`.
    """

    def __init__(
        self,
        parts: Sequence[MicroBatch],
        parameters: Sequence[Tensor],
        *,
        second: SecondDerivatives,
        reduce: Reduce | None = None,
        processes: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(parts, parameters, reduce=reduce)
        self._second, self._exact = second, HessianOperator(parts, parameters, processes=processes, **options)
        self._difference = GradientDifferenceOperator(parts, parameters, history=second.history, processes=processes)

    def local_gradient(self) -> Tensor:
        """Return this rank's term of ∇L."""
        return self._either(lambda operator: operator.local_gradient())

    def local_product(self, vector: Tensor) -> Tensor:
        """Return this rank's term of Hv."""
        return self._either(lambda operator: operator.local_product(vector))

    def local_products(self, vectors: Tensor) -> Tensor:
        """Return this rank's terms of the products with several vectors, (q, n)."""
        return self._either(lambda operator: operator.local_products(vectors))

    def local_form_terms(self, vector: Tensor) -> Tensor:
        """Return this rank's part of the terms of vᵀHv."""
        return self._either(lambda operator: operator.local_form_terms(vector))

    def close(self) -> None:
        """Release the graphs."""
        self._exact.close()

    def _either(self, compute: Callable[[CurvatureOperator], Tensor]) -> Tensor:
        if self._second.missing:
            return compute(self._difference)
        try:
            return compute(self._exact)
        except RuntimeError as error:
            if not lacks_derivatives(error):
                raise
            lack = error.with_traceback(None)  # whose frames hold graphs
        self.close()
        result = compute(self._difference)  # where it fails as well, second derivatives were not missing
        self._second.lack(lack)
        return result
