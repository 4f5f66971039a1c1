"""Metrics of the spectrum of the Hessian: ``update`` collects data, ``compute`` evaluates all of it."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_curvature.distributed.reduce import has_group, sum_in_group
from lightning_curvature.linalg import Eigenpairs, SpectralDensity, TraceEstimate, eigenpairs, spectral_density, trace
from lightning_curvature.metrics.model import LossFunction, ModelMetric
from lightning_curvature.operators import Curvature, CurvatureOperator
from lightning_curvature.operators.graphs import KeepGraph
from lightning_curvature.operators.micro_batches import sample_count


class _OperatorMetric(ModelMetric):
    """Base: collects batches, and makes the operator of the mean loss over the samples of all ranks.

    Batches are no metric state, which torchmetrics would gather: each rank multiplies with its batches, and the
    products are summed.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_function: LossFunction,
        *,
        curvature: Curvature = "hessian",
        keep_graph: KeepGraph = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(model, loss_function, curvature=curvature, sync_on_compute=False, **kwargs)
        self._keep_graph = keep_graph
        self._batches: list[tuple[Any, Any]] = []

    def update(self, inputs: Any, targets: Any) -> None:
        """Add a batch, until ``reset``."""
        self._batches.append((inputs, targets))

    def forward(self, inputs: Any, targets: Any) -> Any:
        """Add a batch, and return the value on this batch alone."""
        self.update(inputs, targets)
        batches, self._batches = self._batches, [(inputs, targets)]
        try:
            return type(self).compute(self)
        finally:
            self._batches = batches

    def reset(self) -> None:
        """Forget the batches."""
        super().reset()
        self._batches = []

    def operator(self) -> CurvatureOperator:
        """Return the operator of the mean loss over the samples of all ranks, at the parameters as they are."""
        micro_batches = self._micro_batches(self._batches)
        reduce, processes = None, 1
        if has_group() and dist.get_world_size() > 1:
            processes, reduce = dist.get_world_size(), sum_in_group
            count = torch.tensor(float(sum(sample_count(y) for _, y in self._batches)), device=self.device)
            share = float(count / sum_in_group(count))
            micro_batches = [replace(one, weight=one.weight * share) for one in micro_batches]
        return self._operator_type(
            micro_batches, self._trained(), reduce=reduce, keep_graph=self._keep_graph, processes=processes
        )


class HessianEigenvalues(_OperatorMetric):
    r"""The largest eigenvalues of the Hessian, or of the Gauss–Newton matrix, of a model's loss.

    .. math:: H v_i = \lambda_i v_i, \qquad \lambda_1 \ge \dots \ge \lambda_k

    ``update`` takes ``inputs`` and ``targets`` of a batch; ``compute`` gives λ_1 … λ_k, (k,) float64, a scalar for
    k = 1. ``pairs`` then holds vectors, residuals and whether they converged. The next ``compute`` begins with these
    vectors, also after a ``reset``.

    Args:
        model: maps inputs to outputs, in training or eval mode as you set it, without dropout.
        loss_function: mean loss of (outputs, targets).
        k: number of eigenvalues.
        tolerance: relative residual ‖Hv−λv‖/|λ|.
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
        self._searches = 0

    def compute(self) -> Tensor:
        """Return λ_1 … λ_k."""
        start: Sequence[Tensor] = self.pairs.vectors if self.pairs is not None else ()
        with closing(self.operator()) as operator:
            # Other random vectors at each search: the next one sees an eigenvector that one draw missed.
            generator = torch.Generator(operator.space.device).manual_seed(self._searches)
            self._searches += 1
            self.pairs = eigenpairs(
                operator, operator.space, largest=self.k, tolerance=self.tolerance, start=start, generator=generator
            )
        return self.pairs.values


class HessianTrace(_OperatorMetric):
    r"""The trace of the Hessian, or of the Gauss–Newton matrix, of a model's loss.

    ``update`` takes ``inputs`` and ``targets`` of a batch; ``compute`` gives tr H, a float64 scalar. ``estimate`` then
    holds its standard error; see :func:`~lightning_curvature.linalg.trace`. Other arguments as for
    :class:`HessianEigenvalues`.

    Args:
        relative_error: relative standard error of the estimate.

    Source: Meyer et al. 2021; Chen and Hallman 2022.

    Example:
        >>> metric = HessianTrace(nn.Linear(2, 1, bias=False), nn.functional.mse_loss)
        >>> metric.update(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1))
        >>> metric.compute().round(decimals=4)
        tensor(5., dtype=torch.float64)
    """

    def __init__(
        self,
        model: nn.Module,
        loss_function: LossFunction,
        *,
        relative_error: float = 0.05,
        curvature: Curvature = "hessian",
        keep_graph: KeepGraph = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(model, loss_function, curvature=curvature, keep_graph=keep_graph, **kwargs)
        self.relative_error = relative_error
        self.estimate: TraceEstimate | None = None

    def compute(self) -> Tensor:
        """Return tr H."""
        with closing(self.operator()) as operator:
            self.estimate = trace(operator, operator.space, relative_error=self.relative_error)
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
        with closing(self.operator()) as operator:
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
