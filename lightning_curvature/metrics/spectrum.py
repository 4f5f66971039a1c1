"""Metrics of the spectrum of the Hessian: ``update`` collects data, ``compute`` evaluates all of it."""

import functools
import math
from collections.abc import Generator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_curvature.arguments import MANY, checked, fraction, whole
from lightning_curvature.distributed.reduce import sum_in_group
from lightning_curvature.distributed.together import elsewhere
from lightning_curvature.linalg import Eigenpairs, EigenTracker, SpectralDensity, TraceEstimate, spectral_density, trace
from lightning_curvature.linalg.krylov import NonFiniteProductError
from lightning_curvature.metrics.model import Batch, LossFunction, ModelMetric
from lightning_curvature.operators import Curvature, CurvatureOperator
from lightning_curvature.operators.exact import CURVATURE, KEEP_GRAPH
from lightning_curvature.operators.graphs import KeepGraph
from lightning_curvature.operators.micro_batches import sample_count
from lightning_curvature.replay.batches import copied
from lightning_curvature.reporting.loggers import warn

_OPERATOR = {"curvature": CURVATURE, "keep_graph": KEEP_GRAPH}


class _OperatorMetric(ModelMetric):
    """Base: keeps batches, and makes the operator of the mean loss over the samples of all ranks.

    ``update`` keeps a copy of the batch. Batches are a state, but are never gathered: each rank multiplies with its
    own, and the products are summed. A rank may have none.
    """

    batches: list[Batch]

    @checked(**_OPERATOR)
    def __init__(
        self,
        model: nn.Module,
        loss_function: LossFunction,
        *,
        curvature: Curvature = "hessian",
        keep_graph: KeepGraph = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(model, loss_function, curvature=curvature, **kwargs)
        self._keep_graph = keep_graph
        self.add_state("batches", [], dist_reduce_fx=None)

    def update(self, inputs: Any, targets: Any) -> None:
        """Add a batch, until ``reset``."""
        self.batches = [*self.batches, copied((inputs, targets))]

    def operator(self) -> CurvatureOperator:
        """Return the operator of the mean loss over the samples of all ranks, at the parameters as they are.

        Every rank must call it, unless ``sync_on_compute=False``, which takes the batches of this rank.

        Raises:
            ValueError: if no rank has a batch, or targets have no samples.
        """
        summed, parameters = self._to_sync and self.distributed_available_fn(), self._trained()
        reduce = functools.partial(sum_in_group, group=self.process_group) if summed else None
        own, error = 0.0, None
        try:
            own = float(sum(sample_count(y) for _, y in self.batches))
        except ValueError as caught:
            # Said by NaN: no rank waits for this one.
            own, error = math.nan, caught
        total = own
        if reduce is not None:
            device = parameters[0].device if parameters else self.device
            total = reduce(torch.tensor(own, dtype=torch.float64, device=device)).item()
        if error is not None or math.isnan(total):
            raise error or elsewhere("counting the samples", mistake=False)
        parts = self._micro_batches(self.batches) if self.batches or not total else []
        return self._operator_type(
            [replace(one, weight=one.weight * (own / total)) for one in parts],
            parameters,
            reduce=reduce,
            keep_graph=self._keep_graph,
            processes=dist.get_world_size(self.process_group) if summed else 1,
        )

    @contextmanager
    def _operator(self) -> Generator[CurvatureOperator, None, None]:
        """Close the operator at the end; a product that failed on this rank raises its own error."""
        with closing(self.operator()) as operator:
            try:
                yield operator
            except NonFiniteProductError as error:
                raise operator.error or error from None


class HessianEigenvalues(_OperatorMetric):
    r"""The largest eigenvalues of the Hessian, or of the Gauss–Newton matrix, of a model's loss.

    .. math:: H v_i = \lambda_i v_i, \qquad \lambda_1 \ge \dots \ge \lambda_k

    ``update`` takes ``inputs`` and ``targets`` of a batch; ``compute`` gives λ_1 … λ_k, (k,) float64, a scalar for
    k = 1. ``pairs`` then holds vectors, errors and whether they converged. The next ``compute`` goes on from these,
    also after a ``reset``: see :class:`~lightning_curvature.linalg.EigenTracker`.

    Args:
        model: maps inputs to outputs, in training or eval mode as you set it, without dropout.
        loss_function: mean loss of (outputs, targets).
        k: number of eigenvalues.
        tolerance: relative error of the eigenvalues.
        curvature: "hessian" or "gauss_newton".
        keep_graph: see :class:`~lightning_curvature.operators.HessianOperator`.
        **kwargs: of ``torchmetrics.Metric``.

    Raises:
        ValueError: for an unknown ``curvature``, and from ``compute`` without a batch.

    Source: Cohen et al. 2021.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> metric = HessianEigenvalues(model, nn.functional.mse_loss)
        >>> metric.update(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1))
        >>> metric.compute().round(decimals=4)  # H = 2 E xxᵀ = diag(1, 4)
        tensor(4., dtype=torch.float64)
    """

    @checked(
        k=whole(1, "1 is the largest eigenvalue alone", MANY),
        tolerance=fraction("1e-3 gives eigenvalues to three digits"),
        **_OPERATOR,
    )
    def __init__(
        self,
        model: nn.Module,
        loss_function: LossFunction,
        *,
        k: int = 1,
        tolerance: float = 1e-3,
        curvature: Curvature = "hessian",
        keep_graph: KeepGraph = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(model, loss_function, curvature=curvature, keep_graph=keep_graph, **kwargs)
        self.k = k
        self.tolerance = tolerance
        self.pairs: Eigenpairs | None = None
        # Number of searches, and what they go on from: of this rank alone, and over ranks, where all need the same.
        self._searches: dict[bool, tuple[int, EigenTracker]] = {}

    def compute(self) -> Tensor:
        """Return λ_1 … λ_k."""
        with self._operator() as operator:
            over_ranks = operator.reduce is not None
            number, tracker = self._searches.get(over_ranks, (0, EigenTracker()))
            # Other random vectors at each search: the next one sees an eigenvector that one draw missed.
            generator = torch.Generator(operator.space.device).manual_seed(number)
            self.pairs = tracker.search(
                operator, operator.space, largest=self.k, tolerance=self.tolerance, generator=generator
            )
            self._searches[over_ranks] = number + 1, tracker
        return self.pairs.values


class HessianTrace(_OperatorMetric):
    r"""The trace of the Hessian, or of the Gauss–Newton matrix, of a model's loss.

    ``update`` takes ``inputs`` and ``targets`` of a batch; ``compute`` gives tr H, a float64 scalar. ``estimate`` then
    holds its standard error, and ``converged``; see :func:`~lightning_curvature.linalg.trace`. A trace that has not
    reached ``relative_error`` within ``max_matvecs`` products comes with a warning. Other arguments as for
    :class:`HessianEigenvalues`.

    Args:
        relative_error: relative standard error of the estimate.
        max_matvecs: largest number of products. From N + 3 on the trace is exact where samples would take more.

    Source: Meyer et al. 2021; Chen and Hallman 2022.

    Example:
        >>> metric = HessianTrace(nn.Linear(2, 1, bias=False), nn.functional.mse_loss)
        >>> metric.update(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1))
        >>> metric.compute().round(decimals=4)
        tensor(5., dtype=torch.float64)
    """

    @checked(relative_error=fraction("0.05 gives the trace to 5 %"), **_OPERATOR)
    def __init__(
        self,
        model: nn.Module,
        loss_function: LossFunction,
        *,
        relative_error: float = 0.05,
        max_matvecs: int = 100,
        curvature: Curvature = "hessian",
        keep_graph: KeepGraph = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(model, loss_function, curvature=curvature, keep_graph=keep_graph, **kwargs)
        self.relative_error, self.max_matvecs = relative_error, max_matvecs
        self.estimate: TraceEstimate | None = None

    def compute(self) -> Tensor:
        """Return tr H."""
        with self._operator() as operator:
            self.estimate = found = trace(
                operator, operator.space, relative_error=self.relative_error, max_matvecs=self.max_matvecs
            )
        if not found.converged:
            warn(
                f"the trace must be known to {self.relative_error:.2g} of its value, got {found.value:.4g} with a "
                f"standard error of {found.standard_error:.2g} after {found.matvecs} products: raise max_matvecs, or "
                "relative_error."
            )
        return torch.tensor(self.estimate.value, dtype=torch.float64)


class HessianDensity(_OperatorMetric):
    r"""The spectral density of the Hessian, or of the Gauss–Newton matrix, of a model's loss.

    ``update`` takes ``inputs`` and ``targets`` of a batch; ``compute`` gives the density on a grid, (2, points)
    float64: places and values. ``density`` then holds nodes, weights and moments; see
    :func:`~lightning_curvature.linalg.spectral_density`. Other arguments as for :class:`HessianEigenvalues`.

    Args:
        starts: number of random starts.
        steps: products for each start.

    Source: Ghorbani, Krishnan and Xiao 2019.

    Example:
        >>> metric = HessianDensity(nn.Linear(2, 1, bias=False), nn.functional.mse_loss, starts=1, steps=2)
        >>> metric.update(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1))
        >>> places, values = metric.compute()
        >>> round(torch.trapezoid(values, places).item(), 3)
        1.0
    """

    @checked(starts=whole(1, "2 tell the error", MANY), steps=whole(1, "40 make a good picture", MANY), **_OPERATOR)
    def __init__(
        self,
        model: nn.Module,
        loss_function: LossFunction,
        *,
        starts: int = 2,
        steps: int = 40,
        curvature: Curvature = "hessian",
        keep_graph: KeepGraph = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(model, loss_function, curvature=curvature, keep_graph=keep_graph, **kwargs)
        self.starts, self.steps = starts, steps
        self.density: SpectralDensity | None = None

    def compute(self) -> Tensor:
        """Return places and density."""
        with self._operator() as operator:
            self.density = spectral_density(operator, operator.space, starts=self.starts, steps=self.steps)
        grid = self.density.grid()
        return torch.stack([grid, self.density.evaluate(grid)])

    def plot(self, val: Tensor | None = None, ax: Any = None) -> Any:
        """Plot the density on a logarithmic scale; arguments as for the other metrics, ``val`` is one value."""
        import matplotlib.pyplot as plt

        places, values = self.compute() if val is None else val
        axes = ax if ax is not None else plt.subplots()[1]
        axes.semilogy(places.numpy(), values.numpy())
        axes.set_xlabel("eigenvalue")
        axes.set_ylabel("density")
        return axes.figure, axes
