"""The base class of the operators: sums over micro-batches and ranks."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_curvature.arguments import Rule, checked
from lightning_curvature.linalg import VectorSpace
from lightning_curvature.linalg.space import Reduce
from lightning_curvature.operators.micro_batches import MicroBatch, building_graphs, micro_batches

# A rank may have no micro-batch.
PARTS = Rule("micro_batches() makes them", empty=True)
PARAMETERS = Rule("give those that are trained")


class CurvatureOperator:
    """A symmetric operator on the space of the parameters: v ↦ Av, called with a flat vector of ``space``.

    Each rank sums over its own micro-batches, and one reduction a product adds the sums of the ranks. A rank whose
    computation fails sends NaN, so that no other rank waits for it, and keeps its error in ``error``.

    Args:
        parts: this rank's micro-batches; their weights add up to 1 over all ranks.
        parameters: the parameters to differentiate by, each once.
        reduce: sum over the ranks, in place or not; None on one process.

    Raises:
        ValueError: if there are no parameters.
    """

    @checked(parts=PARTS, parameters=PARAMETERS)
    def __init__(
        self, parts: Sequence[MicroBatch], parameters: Sequence[Tensor], *, reduce: Reduce | None = None
    ) -> None:
        self.parts, self.parameters, self.reduce = list(parts), list(parameters), reduce
        self.space = VectorSpace(self.parameters)
        self.error: Exception | None = None
        self._substitute: float | None = None

    def __call__(self, vector: Tensor) -> Tensor:
        """Return Av."""
        self.space.check(vector)
        return self.summed(lambda: self.local_product(vector))

    def summed(self, compute: Callable[[], Tensor], zeros: Callable[[], Tensor] | None = None) -> Tensor:
        """Return the sum over the ranks of a tensor that each computes; ``zeros()`` has its shape (a vector)."""
        if self.reduce is None:
            return compute()
        zeros = zeros or self.space.zeros
        if self._substitute is not None:
            return self.reduce(zeros().fill_(self._substitute))
        try:
            local = compute()
        except Exception as error:
            self.error = error
            local = zeros().fill_(torch.nan)
        return self.reduce(local)

    def fail(self, error: Exception) -> None:
        """Report an error of this rank between products: it takes part in the next product of the others, with NaN."""
        if self.reduce is not None:
            self.error = error
            self._take_part(torch.nan)

    def all_ended(self) -> bool:
        """Return whether no rank failed since its last product; takes the reductions of a product, computes none."""
        return self.reduce is None or bool(self._take_part(0.0).isfinite().all())

    def _take_part(self, value: float) -> Tensor:
        self._substitute = value
        try:
            return self(self.space.zeros())
        finally:
            self._substitute = None

    def local_product(self, vector: Tensor) -> Tensor:
        """Return this rank's term of Av, in a new tensor."""
        raise NotImplementedError

    def gradient(self) -> Tensor:
        """Return ∇L = Σ w ∇L_m over all ranks, in a new vector; from the graphs of the products where they are kept."""
        return self.summed(self.local_gradient)

    def local_gradient(self) -> Tensor:
        """Return this rank's term of ∇L, in a new vector."""
        return self.weighted_sum(self.gradient_of)

    def weighted_sum(self, term: Callable[[int], Sequence[Tensor | None]]) -> Tensor:
        """Return Σ w · term(m) over this rank's micro-batches m."""
        total: Tensor | None = None
        for index, part in enumerate(self.parts):
            # The sum begins with the first term: fewer passes over memory than to add it to zeros.
            if total is None:
                total = self.space.pack(term(index))
                if part.weight != 1.0:
                    total.mul_(part.weight)
            else:
                self.space.add_(total, term(index), part.weight)
        return self.space.zeros() if total is None else total

    def quadratic_form(self, vector: Tensor) -> float:
        """Return vᵀAv, over all ranks: one product, and where ranks add terms a reduction of a few numbers."""
        return float(self.form_terms(vector).sum())

    def form_terms(self, vector: Tensor) -> Tensor:
        """Return the terms of vᵀAv by parameter, vᵢ·(Av)ᵢ, (parameters,) float64; the cost is that of the sum."""
        self.space.check(vector)
        count, device = len(self.parameters), self.space.device
        zeros = functools.partial(torch.zeros, count, dtype=torch.float64, device=device)
        return self.summed(lambda: self.local_form_terms(vector), zeros)

    def local_form_terms(self, vector: Tensor) -> Tensor:
        """Return this rank's part of the terms of vᵀAv."""
        return self.space.dots_by_tensor(vector, self.local_product(vector))

    def local_products(self, vectors: Tensor) -> Tensor:
        """Return this rank's terms of the products with several vectors, (q, n)."""
        return torch.stack([self.local_product(vector) for vector in vectors])

    def uncertainty(self, vector: Tensor, form: float) -> float:
        """Return how far a quadratic form vᵀAv may be off but for rounding: 0.0 where products are exact."""
        return 0.0

    def gradient_of(self, index: int) -> tuple[Tensor | None, ...]:
        """Return the gradient of the loss of one micro-batch, unweighted."""
        # By the same code as the products: compiled or fused code draws other dropout masks.
        with building_graphs():
            return torch.autograd.grad(self.parts[index].with_graph().loss, self.parameters, allow_unused=True)

    def close(self) -> None:
        """Release what is kept from product to product."""

    @property
    def together(self) -> bool:
        """Whether ranks make each product together, so that one to which a rank sent NaN is NaN on all of them."""
        return self.reduce is not None

    @classmethod
    @checked(batches=Rule("give a list of (inputs, targets)"))
    def of(
        cls,
        model: nn.Module,
        loss_function: Callable[[Tensor, Any], Tensor],
        batches: Sequence[tuple[Any, Any]],
        **options: Any,
    ) -> "CurvatureOperator":
        """Return the operator of a model's loss on (inputs, targets), for the parameters that require gradients.

        Args:
            model: with dropout off, and BatchNorm in eval mode unless each batch is normalized by its own statistics.
            loss_function: mean loss of (outputs, targets).
            batches: all data, in batches of any size.
            **options: of the class.
        """
        parameters = [p for p in model.parameters() if p.requires_grad]
        return cls(micro_batches(model, loss_function, batches), parameters, **options)
