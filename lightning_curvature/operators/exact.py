"""Exact products with the Hessian and the Gauss–Newton matrix of a loss, summed over micro-batches and ranks."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_curvature.functional.products import check_differentiable
from lightning_curvature.linalg import VectorSpace
from lightning_curvature.operators.graphs import Graphs, KeepGraph, pull_back
from lightning_curvature.operators.micro_batches import MicroBatch, building_graphs, micro_batches

Reduce = Callable[[Tensor], Tensor]
Curvature = Literal["hessian", "gauss_newton"]


class CurvatureOperator:
    """A symmetric operator on the space of the parameters: v ↦ Av, called with a flat vector of ``space``.

    Each rank sums over its own micro-batches, and one reduction a product brings the sums together. A rank whose part
    fails sends NaN, so that none waits for it; its error is kept in ``error``.

    Args:
        parts: this rank's micro-batches; their weights add up to 1 over all ranks.
        parameters: the parameters that are differentiated, each once.
        reduce: sum over the ranks, in place or not; None on one process.

    Attributes:
        space: the vector space.
        error: what made this rank fail, or None.

    Raises:
        ValueError: if there are no parameters.
    """

    def __init__(
        self, parts: Sequence[MicroBatch], parameters: Sequence[Tensor], *, reduce: Reduce | None = None
    ) -> None:
        self.parts, self.parameters, self.reduce = list(parts), list(parameters), reduce
        self.space = VectorSpace(self.parameters)
        self.error: Exception | None = None
        self._instead: float | None = None

    def __call__(self, vector: Tensor) -> Tensor:
        """Return Av."""
        return self.summed(lambda: self.local_product(vector))

    def summed(self, own_part: Callable[[], Tensor], nothing: Callable[[], Tensor] | None = None) -> Tensor:
        """Sum over the ranks of a tensor of which each makes its part; ``nothing`` is of its shape (a vector)."""
        if self.reduce is None:
            return own_part()
        nothing = nothing or self.space.zeros
        if self._instead is not None:
            return self.reduce(nothing().fill_(self._instead))
        try:
            part = own_part()
        except Exception as error:
            self.error = error
            part = nothing().fill_(torch.nan)
        return self.reduce(part)

    def fail(self, error: Exception) -> None:
        """Tell the others of an error that came between products: take part in their next one, with NaN.

        Args:
            error: kept in ``error``.
        """
        if self.reduce is not None:
            self.error = error
            self._take_part(torch.nan)

    def all_ended(self) -> bool:
        """Whether every rank is done with its products; False where one failed since its last. Costs no product."""
        return self.reduce is None or bool(self._take_part(0.0).isfinite().all())

    def _take_part(self, value: float) -> Tensor:
        """Make the reductions of a product, with a number in place of what would be computed."""
        self._instead = value
        try:
            return self(self.space.zeros())
        finally:
            self._instead = None

    def local_product(self, vector: Tensor) -> Tensor:
        """This rank's part of Av, in a new tensor."""
        raise NotImplementedError

    def gradient(self) -> Tensor:
        """Return ∇L = Σ w ∇L_m over all ranks, in a new vector; from the graphs of the products where they are kept."""
        return self.summed(self.local_gradient)

    def local_gradient(self) -> Tensor:
        """This rank's part of ∇L, in a new vector."""
        return self.weighted_sum(self.gradient_of)

    def weighted_sum(self, of_part: Callable[[int], Sequence[Tensor | None]]) -> Tensor:
        """Sum over this rank's micro-batches of what is given for each of them, by their weights."""
        total: Tensor | None = None
        for index, part in enumerate(self.parts):
            # The first is the beginning of the sum: fewer passes over memory than to add it to zeros.
            if total is None:
                total = self.space.pack(of_part(index))
                if part.weight != 1.0:
                    total.mul_(part.weight)
            else:
                self.space.add_(total, of_part(index), part.weight)
        return self.space.zeros() if total is None else total

    def quadratic_form(self, vector: Tensor) -> float:
        """Return vᵀAv, over all ranks."""
        return self.space.dot(vector, self(vector))

    def gradient_of(self, index: int) -> tuple[Tensor | None, ...]:
        """Gradient of the loss of one micro-batch, unweighted."""
        # Of the same code as the products: dropout draws other masks where it is compiled or fused.
        with building_graphs():
            loss = self.parts[index].evaluate().loss
            check_graph(loss)
            return torch.autograd.grad(loss, self.parameters, allow_unused=True)

    def close(self) -> None:
        """Let go of what is kept from product to product."""

    @classmethod
    def of(
        cls,
        model: nn.Module,
        loss_function: Callable[[Tensor, Any], Tensor],
        batches: Sequence[tuple[Any, Any]],
        **options: Any,
    ) -> "CurvatureOperator":
        """Make the operator of a model's loss on (inputs, targets), for the parameters that require gradients.

        Args:
            model: in the mode in which its curvature is wanted; dropout must be off, and BatchNorm in eval mode unless
                the loss of each batch by its own statistics is meant.
            loss_function: mean loss of (outputs, targets).
            batches: all data, any sizes.
            **options: of the class.
        """
        parameters = [p for p in model.parameters() if p.requires_grad]
        return cls(micro_batches(model, loss_function, batches), parameters, **options)


class _GraphOperator(CurvatureOperator):
    """Base of the operators that keep a graph of each micro-batch from product to product.

    Args:
        parts: see :class:`CurvatureOperator`.
        parameters: see :class:`CurvatureOperator`.
        reduce: see :class:`CurvatureOperator`.
        keep_graph: True, False, or "auto": as many as fit into memory.
        processes: how many processes share the memory.
    """

    def __init__(
        self,
        parts: Sequence[MicroBatch],
        parameters: Sequence[Tensor],
        *,
        reduce: Reduce | None = None,
        keep_graph: KeepGraph = "auto",
        processes: int = 1,
    ) -> None:
        super().__init__(parts, parameters, reduce=reduce)
        self._graphs: Graphs[Any] = Graphs(len(self.parts), keep_graph, self.parameters, processes)

    def product_of(self, index: int, vectors: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """Product with the matrix of one micro-batch, unweighted."""
        raise NotImplementedError

    def local_product(self, vector: Tensor) -> Tensor:
        """This rank's part of Av."""
        views = self.space.views(vector)
        return self.weighted_sum(lambda index: self.product_of(index, views))

    def quadratic_form(self, vector: Tensor) -> float:
        """Return vᵀAv, over all ranks: one product, of which a single number is reduced."""
        views = self.space.views(vector)

        def zero() -> Tensor:
            return torch.zeros((), dtype=torch.float64, device=self.space.device)

        def own_part() -> Tensor:
            terms = [
                part.weight * torch.dot(product.reshape(-1).to(view.dtype), view.reshape(-1)).double()
                for index, part in enumerate(self.parts)
                for product, view in zip(self.product_of(index, views), views, strict=True)
                if product is not None
            ]
            return torch.stack([zero(), *terms]).sum()

        return float(self.summed(own_part, zero))

    def close(self) -> None:
        """Let go of the graphs."""
        self._graphs.clear()


class HessianOperator(_GraphOperator):
    r"""Products with the Hessian by double backward.

    .. math:: Hv = \sum_m w_m\, \partial_\theta (\nabla L_m \cdot v)

    The gradient's graph is kept where it fits (see :class:`~.graphs.Graphs`); a product then costs about two
    forward+backwards of the data, else one more.

    Args:
        parts: see :class:`CurvatureOperator`.
        parameters: see :class:`CurvatureOperator`.
        reduce: see :class:`CurvatureOperator`.
        keep_graph: True, False, or "auto": as many as fit into memory.
        processes: how many processes share the memory.

    Raises:
        ValueError: if a loss has no graph.

    Source: Pearlmutter 1994.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> data = [(torch.tensor([[1.0]]), torch.zeros(1, 1)), (torch.tensor([[2.0], [3.0]]), torch.zeros(2, 1))]
        >>> hessian = HessianOperator.of(model, nn.functional.mse_loss, data)
        >>> hessian(torch.ones(1))  # 2 E x² = 2 · (1 + 4 + 9) / 3
        tensor([9.3333])
    """

    def _build(self, index: int) -> tuple[Tensor | None, ...]:
        with building_graphs():
            loss = self.parts[index].evaluate().loss
            check_graph(loss)
            gradients = torch.autograd.grad(loss, self.parameters, create_graph=True, allow_unused=True)
            check_differentiable(gradients)
            return gradients

    def gradient_of(self, index: int) -> tuple[Tensor | None, ...]:
        """Gradient of the loss of one micro-batch, unweighted."""
        return self._graphs.get(index, self._build)

    def product_of(self, index: int, vectors: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """Product with the Hessian of one micro-batch, unweighted."""
        gradients = self._graphs.get(index, self._build)
        with building_graphs():
            return pull_back(gradients, self.parameters, vectors, retain=self._graphs.keeps(index))


class _GaussNewtonGraph(NamedTuple):
    """Graph of one micro-batch: loss ℓ, outputs z, ∂ℓ/∂z, a cotangent w of z that is a variable, and Jᵀw."""

    loss: Tensor
    outputs: Tensor
    residual: Tensor
    cotangent: Tensor
    pulled_back: tuple[Tensor | None, ...]


class GaussNewtonOperator(_GraphOperator):
    r"""Products with the Gauss–Newton matrix of any loss ℓ(z) of the outputs z.

    .. math:: Gv = \sum_m w_m\, J_m^\top (\nabla^2_z \ell_m)\, J_m v

    Jv is the derivative of Jᵀw with respect to w, so that no forward mode is needed and one kept graph serves all
    products; a product then costs about one forward+backward of the data.

    Args:
        parts: see :class:`CurvatureOperator`; their evaluations must come with outputs, in the graph of the loss.
        parameters: see :class:`CurvatureOperator`.
        reduce: see :class:`CurvatureOperator`.
        keep_graph: see :class:`HessianOperator`.
        processes: see :class:`HessianOperator`.

    Raises:
        ValueError: if an evaluation has no outputs, or the loss does not depend on them.

    Attributes:
        mismatch: ‖∇L − Jᵀ∂ℓ/∂z‖/‖∇L‖ of the first micro-batch, once multiplied: 0 where the loss depends on the
            parameters through the outputs alone. Else G leaves out what does not pass through them.

    Source: Schraudolph 2002; P4, appendix P.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> data = [(torch.tensor([[1.0]]), torch.zeros(1, 1)), (torch.tensor([[2.0], [3.0]]), torch.zeros(2, 1))]
        >>> GaussNewtonOperator.of(model, nn.functional.mse_loss, data)(torch.ones(1))
        tensor([9.3333])
    """

    def __init__(self, parts: Sequence[MicroBatch], parameters: Sequence[Tensor], **options: Any) -> None:
        super().__init__(parts, parameters, **options)
        self.mismatch: float | None = None

    def _build(self, index: int) -> _GaussNewtonGraph:
        with building_graphs():
            result = self.parts[index].evaluate()
            check_graph(result.loss)
            outputs = result.outputs
            if outputs is None or not outputs.requires_grad:
                raise ValueError(
                    "outputs must come with the loss, in its graph, got none: compute them by calling self(…) exactly "
                    "once, or name the submodule that makes them, outputs='head'."
                )
            (residual,) = torch.autograd.grad(result.loss, outputs, create_graph=True, allow_unused=True)
            if residual is None:
                raise ValueError(
                    "the loss must be computed from the outputs, got outputs that it does not depend on: return those "
                    "that go into the loss."
                )
            if self.mismatch is None:
                self.mismatch = self._mismatch(result.loss, outputs, residual)
            cotangent = torch.zeros_like(outputs, requires_grad=True)
            pulled_back = torch.autograd.grad(outputs, self.parameters, cotangent, create_graph=True, allow_unused=True)
            check_differentiable(pulled_back)
        return _GaussNewtonGraph(result.loss, outputs, residual, cotangent, pulled_back)

    def gradient_of(self, index: int) -> tuple[Tensor | None, ...]:
        """Gradient of the loss of one micro-batch, unweighted; also of what does not pass through the outputs."""
        graph, keep = self._graphs.get(index, self._build), self._graphs.keeps(index)
        return torch.autograd.grad(graph.loss, self.parameters, retain_graph=keep, allow_unused=True)

    def _mismatch(self, loss: Tensor, outputs: Tensor, residual: Tensor) -> float:
        whole = torch.autograd.grad(loss, self.parameters, retain_graph=True, allow_unused=True)
        through = torch.autograd.grad(outputs, self.parameters, residual.detach(), retain_graph=True, allow_unused=True)
        gradient = self.space.pack(whole)
        size = self.space.norm(gradient)
        return self.space.norm(self.space.add_(gradient, through, -1.0)) / size if size else 0.0

    def product_of(self, index: int, vectors: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """Product with the Gauss–Newton matrix of one micro-batch, unweighted."""
        graph, keep = self._graphs.get(index, self._build), self._graphs.keeps(index)
        with building_graphs():
            (jv,) = pull_back(graph.pulled_back, [graph.cotangent], vectors, retain=True)
            curved = None if jv is None else pull_back([graph.residual], [graph.outputs], [jv], retain=True)[0]
            if curved is None:
                return (None,) * len(self.parameters)
            return pull_back([graph.outputs], self.parameters, [curved], retain=keep)


def operator_type(curvature: str) -> type[HessianOperator] | type[GaussNewtonOperator]:
    """The class of operators of a kind of curvature, by name.

    Raises:
        ValueError: for an unknown one.
    """
    kinds = {"hessian": HessianOperator, "gauss_newton": GaussNewtonOperator}
    if curvature not in kinds:
        raise ValueError(f"curvature must be one of {tuple(kinds)}, got {curvature!r}: 'hessian' is the whole.")
    return kinds[curvature]  # type: ignore[return-value]


def check_graph(loss: Tensor) -> None:
    """Raise if a loss has no graph at all."""
    if not loss.requires_grad:
        raise ValueError(
            "the loss must depend on the parameters, got a constant: compute it with gradients enabled, without detach "
            "and outside of no_grad and inference_mode."
        )
