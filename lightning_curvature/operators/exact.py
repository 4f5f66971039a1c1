"""Exact products with the Hessian and the Gauss–Newton matrix of a loss."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_curvature.arguments import Rule, checked, whole
from lightning_curvature.functional.products import check_differentiable, differentiable_gradients
from lightning_curvature.linalg.space import Reduce
from lightning_curvature.operators.base import PARAMETERS, PARTS, CurvatureOperator
from lightning_curvature.operators.graphs import Graphs, KeepGraph, products_with, pull_back
from lightning_curvature.operators.micro_batches import MicroBatch, building_graphs

Curvature = Literal["hessian", "gauss_newton"]
CURVATURE = Rule("'hessian' is the whole")
KEEP_GRAPH = Rule("'auto' keeps what fits")
PROCESSES = whole(1, "count the processes that share the memory")


class _GraphOperator(CurvatureOperator):
    """Base of the operators that keep a graph of each micro-batch from product to product."""

    @checked(parts=PARTS, parameters=PARAMETERS, keep_graph=KEEP_GRAPH, processes=PROCESSES)
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
        """Return the product with the matrix of one micro-batch, unweighted."""
        raise NotImplementedError

    def local_product(self, vector: Tensor) -> Tensor:
        """Return this rank's term of Av."""
        views = self.space.views(vector)
        return self.weighted_sum(lambda index: self.product_of(index, views))

    def local_form_terms(self, vector: Tensor) -> Tensor:
        """Return this rank's part of the terms of vᵀAv: without a vector of the product."""
        views = self.space.views(vector)
        total = torch.zeros(len(views), dtype=torch.float64, device=self.space.device)
        zero = torch.zeros((), dtype=self.space.dtype, device=self.space.device)
        for index, part in enumerate(self.parts):
            products = zip(self.product_of(index, views), views, strict=True)
            terms = [zero if p is None else torch.dot(p.reshape(-1).to(v.dtype), v.reshape(-1)) for p, v in products]
            total.add_(torch.stack(terms), alpha=part.weight)
        return total

    @property
    def left_out(self) -> str:
        """Which graphs are not kept for want of memory, in one sentence; empty where all are."""
        return self._graphs.left_out

    def close(self) -> None:
        """Release the graphs."""
        self._graphs.clear()


class HessianOperator(_GraphOperator):
    r"""Products with the Hessian by double backward.

    .. math:: Hv = \sum_m w_m\, \partial_\theta (\nabla L_m \cdot v)

    The gradient's graph is kept where it fits into memory (see :class:`~.graphs.Graphs`); a product then costs about
    two forward+backwards of the data, otherwise one more.

    Args:
        parts, parameters, reduce: see :class:`~.base.CurvatureOperator`.
        keep_graph: True, False, or "auto": those that fit into half of the free memory.
        processes: number of processes that share the memory.

    Raises:
        ValueError: if a loss has no graph.

    Source: Pearlmutter 1994.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> data = [(torch.tensor([[1.0]]), torch.zeros(1, 1)), (torch.tensor([[2.0], [3.0]]), torch.zeros(2, 1))]
        >>> hessian = HessianOperator.of(model, torch.nn.functional.mse_loss, data)
        >>> hessian(torch.ones(1))  # 2 E x² = 2 · (1 + 4 + 9) / 3
        tensor([9.3333])
    """

    def _build(self, index: int) -> tuple[Tensor | None, ...]:
        with building_graphs():
            return differentiable_gradients(self.parts[index].with_graph().loss, self.parameters)

    def gradient_of(self, index: int) -> tuple[Tensor | None, ...]:
        """Return the gradient of the loss of one micro-batch, unweighted."""
        return self._graphs.get(index, self._build)

    def product_of(self, index: int, vectors: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """Return the product with the Hessian of one micro-batch, unweighted."""
        gradients = self._graphs.get(index, self._build)
        with building_graphs():
            return pull_back(gradients, self.parameters, vectors, retain=self._graphs.keeps(index))

    def local_products(self, vectors: Tensor) -> Tensor:
        """Return this rank's terms of the products with several vectors, (q, n): at once, where operations allow it."""
        total = self.space.zeros(len(vectors))
        for index, part in enumerate(self.parts):
            gradients = self._graphs.get(index, self._build)
            with building_graphs():
                total.add_(products_with(gradients, self.parameters, self.space, vectors), alpha=part.weight)
        return total


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
        parts, parameters, options: see :class:`HessianOperator`; evaluations must hold outputs, in the loss's graph.

    Raises:
        ValueError: if an evaluation has no outputs, or the loss does not depend on them.

    Attributes:
        mismatch: ‖∇L − Jᵀ∂ℓ/∂z‖/‖∇L‖ of the first micro-batch, after the first product: 0 where the loss depends on the
            parameters through the outputs alone. Otherwise G omits the dependence that does not pass through them.

    Source: Schraudolph 2002; Edge of stochastic stability (2025), appendix P.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> data = [(torch.tensor([[1.0]]), torch.zeros(1, 1)), (torch.tensor([[2.0], [3.0]]), torch.zeros(2, 1))]
        >>> GaussNewtonOperator.of(model, torch.nn.functional.mse_loss, data)(torch.ones(1))
        tensor([9.3333])
    """

    @checked(parts=PARTS, parameters=PARAMETERS)
    def __init__(self, parts: Sequence[MicroBatch], parameters: Sequence[Tensor], **options: Any) -> None:
        super().__init__(parts, parameters, **options)
        self.mismatch: float | None = None

    def _build(self, index: int) -> _GaussNewtonGraph:
        with building_graphs():
            result = self.parts[index].with_graph()
            outputs = result.outputs
            if outputs is None or not outputs.requires_grad:
                raise ValueError(
                    "outputs must come with the loss, in its graph, got none: compute them by calling self(…) exactly "
                    "once, or name the submodule that makes them, outputs='head'."
                )
            (residual,) = differentiable_gradients(result.loss, [outputs])
            if residual is None:
                raise ValueError(
                    "the loss must be computed from the outputs, got outputs that it does not depend on: return those "
                    "that go into the loss."
                )
            if self.mismatch is None:
                self.mismatch = self._mismatch(result.loss, outputs, residual)
            cotangent = torch.zeros_like(outputs, requires_grad=True)
            pulled_back = torch.autograd.grad(outputs, self.parameters, cotangent, create_graph=True, allow_unused=True)
            check_differentiable(outputs, self.parameters, pulled_back)
        return _GaussNewtonGraph(result.loss, outputs, residual, cotangent, pulled_back)

    def gradient_of(self, index: int) -> tuple[Tensor | None, ...]:
        """Return the gradient of the whole loss of one micro-batch, unweighted, also where it bypasses the outputs."""
        graph, keep = self._graphs.get(index, self._build), self._graphs.keeps(index)
        return torch.autograd.grad(graph.loss, self.parameters, retain_graph=keep, allow_unused=True)

    def _mismatch(self, loss: Tensor, outputs: Tensor, residual: Tensor) -> float:
        whole = torch.autograd.grad(loss, self.parameters, retain_graph=True, allow_unused=True)
        through = torch.autograd.grad(outputs, self.parameters, residual.detach(), retain_graph=True, allow_unused=True)
        gradient = self.space.pack(whole)
        size = self.space.norm(gradient)
        return self.space.norm(self.space.add_(gradient, through, -1.0)) / size if size else 0.0

    def product_of(self, index: int, vectors: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """Return the product with the Gauss–Newton matrix of one micro-batch, unweighted."""
        graph, keep = self._graphs.get(index, self._build), self._graphs.keeps(index)
        with building_graphs():
            (jv,) = pull_back(graph.pulled_back, [graph.cotangent], vectors, retain=True)
            curved = None if jv is None else pull_back([graph.residual], [graph.outputs], [jv], retain=True)[0]
            if curved is None:
                return (None,) * len(self.parameters)
            return pull_back([graph.outputs], self.parameters, [curved], retain=keep)


@checked(curvature=CURVATURE)
def operator_type(curvature: Curvature) -> type[HessianOperator] | type[GaussNewtonOperator]:
    """Return the class of operators of a kind of curvature, by name.

    Raises:
        ValueError: for an unknown one.
    """
    return HessianOperator if curvature == "hessian" else GaussNewtonOperator
