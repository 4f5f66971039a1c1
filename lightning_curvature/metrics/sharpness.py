"""Metrics of mini-batch sharpness: means over mini-batches that the caller draws, with standard errors."""

from collections.abc import Sequence
from contextlib import closing
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_curvature.arguments import checked, fraction
from lightning_curvature.functional import add_to_moments, merge_moments, ratio_of_means, ratio_standard_error
from lightning_curvature.functional.sharpness import Scalar
from lightning_curvature.linalg import Eigenpairs
from lightning_curvature.metrics.model import CurvatureMetric, LossFunction, ModelMetric, as_draws
from lightning_curvature.operators import Curvature
from lightning_curvature.operators.exact import CURVATURE
from lightning_curvature.operators.mini_batch import MiniBatch


class RatioOfMeans(CurvatureMetric):
    r"""The ratio of two means over independent draws, with its standard error.

    .. math:: r = \frac{\sum_i x_i}{\sum_i y_i}

    ``update`` takes a ``numerator`` x and a ``denominator`` y, 1 for a plain mean, of one draw or of n, (n,) each;
    ``compute`` gives r, a float64
    scalar, NaN where Σy ≤ 0. ``compute``, ``standard_error`` and ``count`` cover the draws of all ranks: all ranks must
    call them.

    Source: Cochran 1977, chapter 6.

    Example:
        >>> metric = RatioOfMeans()
        >>> for x, y in [(1.0, 1.0), (5.0, 2.0)]:
        ...     metric.update(x, y)
        >>> metric.compute(), metric.standard_error()
        (tensor(2., dtype=torch.float64), tensor(0.6667, dtype=torch.float64))
    """

    moments: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("moments", torch.zeros(6, dtype=torch.float64), dist_reduce_fx=merge_moments)

    @checked()
    def update(self, numerator: Scalar, denominator: Scalar = 1.0) -> None:
        """Add a draw, or several, (n,) each."""
        draws = as_draws(self.device, numerator=numerator, denominator=denominator)
        self.moments = add_to_moments(self.moments, *draws)

    def compute(self) -> Tensor:
        """Return r."""
        return ratio_of_means(self.moments)

    def standard_error(self) -> Tensor:
        """Return the standard error of r, a float64 scalar; NaN for fewer than two draws."""
        with self._over_ranks():
            return ratio_standard_error(self.moments)

    def count(self) -> int:
        """Return the number of draws."""
        with self._over_ranks():
            return int(self.moments[0])


class MiniBatchMetric(ModelMetric, RatioOfMeans):
    """Base: a ratio of means; ``update`` evaluates a mini-batch, which gives one draw.

    A draw of 0/0 has no information on the ratio: it is left out of the count, and counted in the state ``skipped``.
    Arguments are those of :class:`BatchSharpness`.
    """

    skipped: Tensor

    def __init__(self, model: nn.Module, loss_function: LossFunction, **options: Any) -> None:
        super().__init__(model, loss_function, **options)
        self.add_state("skipped", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, inputs: Any, targets: Any) -> None:  # type: ignore[override]
        """Add a mini-batch."""
        raise NotImplementedError

    def _add(self, numerator: float, denominator: float = 1.0) -> None:
        if numerator == 0.0 and denominator == 0.0:
            self.skipped = self.skipped + 1
        else:
            self.moments = add_to_moments(self.moments, numerator, denominator)

    def _mini_batch(self, inputs: Any, targets: Any) -> MiniBatch:
        return MiniBatch(self._operator_type(self._micro_batches([(inputs, targets)]), self._trained()))


class BatchSharpness(MiniBatchMetric):
    r"""Batch sharpness: the mean curvature of a mini-batch's loss along the mini-batch's own gradient.

    .. math:: E_B\left[\frac{g_B^\top H_B\, g_B}{\lVert g_B\rVert^2}\right]

    SGD with learning rate η hovers at 2/η: the edge of stochastic stability.

    ``update`` takes ``inputs`` and ``targets`` of a mini-batch, drawn as training draws them, and evaluates it at the
    parameters as they are: a forward, a backward with its graph, one Hessian–vector product of the mini-batch. A
    mini-batch with a zero gradient is left out, and counted in the state ``skipped``. ``compute`` gives the mean, a
    float64 scalar; see :class:`RatioOfMeans` for ``standard_error`` and ``count``.

    Args:
        model: maps inputs to outputs, in training or eval mode as you set it, without dropout.
        loss_function: mean loss of (outputs, targets).
        curvature: "hessian", or "gauss_newton" for the Gauss–Newton matrix in place of H_B.
        **kwargs: of ``torchmetrics.Metric``.

    Raises:
        ValueError: for an unknown ``curvature``.

    Source: Edge of stochastic stability (2025), definition 3.

    Example:
        >>> metric = BatchSharpness(nn.Linear(1, 1, bias=False), nn.functional.mse_loss)
        >>> for x in ([[1.0]], [[2.0]], [[3.0]]):  # H_B = 2x²
        ...     metric.update(torch.tensor(x), torch.zeros(1, 1))
        >>> metric.compute().round(decimals=4), metric.standard_error().round(decimals=4)
        (tensor(9.3333, dtype=torch.float64), tensor(4.6667, dtype=torch.float64))
    """

    def update(self, inputs: Any, targets: Any) -> None:  # type: ignore[override]
        """Add a mini-batch."""
        with closing(self._mini_batch(inputs, targets)) as batch:
            square = batch.squared_norm
            if square:
                self._add(batch.self_curvature / square)
            else:
                self._add(0.0, 0.0)


class StepSharpness(BatchSharpness):
    r"""Step sharpness: the curvature of the last mini-batch's loss along its gradient.

    .. math:: \frac{g_B^\top H_B\, g_B}{\lVert g_B\rVert^2}

    Its average over time is about batch sharpness. ``update`` forgets earlier mini-batches; ``standard_error`` is NaN,
    of one draw. Over several ranks it is the mean over their mini-batches. Arguments, units and errors as for
    :class:`BatchSharpness`.

    Source: Edge of stochastic stability (2025), appendix M.

    Example:
        >>> metric = StepSharpness(nn.Linear(1, 1, bias=False), nn.functional.mse_loss)
        >>> for x in ([[1.0]], [[2.0]]):  # H_B = 2x²
        ...     metric.update(torch.tensor(x), torch.zeros(1, 1))
        >>> metric.compute().round(decimals=4)
        tensor(8., dtype=torch.float64)
    """

    _carried: ClassVar[tuple[str, ...]] = ("moments", "skipped")

    def update(self, inputs: Any, targets: Any) -> None:  # type: ignore[override]
        """Replace the mini-batch."""
        self.moments, self.skipped = torch.zeros_like(self.moments), torch.zeros_like(self.skipped)
        super().update(inputs, targets)


class ModifiedBatchSharpness(MiniBatchMetric):
    r"""Modified batch sharpness: a ratio of means in place of a mean of ratios.

    .. math:: \frac{E_B[g_B^\top H_B\, g_B]}{E_B\lVert g_B\rVert^2}

    It settles above 2/η. Arguments, ``update``, ``compute``, errors and cost as for :class:`BatchSharpness`.

    Source: Edge of stochastic stability (2025), appendix M.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> metric = ModifiedBatchSharpness(model, nn.functional.mse_loss)
        >>> for x in ([[1.0]], [[2.0]]):  # H_B = 2x², g_B = 2x²θ: 2 · (1 + 64)/(1 + 16)
        ...     metric.update(torch.tensor(x), torch.zeros(1, 1))
        >>> metric.compute().round(decimals=4)
        tensor(7.6471, dtype=torch.float64)
    """

    def update(self, inputs: Any, targets: Any) -> None:  # type: ignore[override]
        """Add a mini-batch."""
        with closing(self._mini_batch(inputs, targets)) as batch:
            self._add(batch.self_curvature, batch.squared_norm)


class BatchLambdaMax(MiniBatchMetric):
    r"""The mean over mini-batches of the largest eigenvalue of a mini-batch's Hessian.

    .. math:: E_B[\lambda_{\max}(H_B)]

    It lies between 2/η and 4/η at the edge. Arguments, ``update``, ``compute`` and errors as for
    :class:`BatchSharpness`; an eigenvalue takes about ten Hessian–vector products of the mini-batch. The search begins
    with the eigenvector of the last mini-batch, also after a ``reset``; ``pairs`` holds its result.

    Args:
        tolerance: relative error of each eigenvalue, far below the scatter over mini-batches.

    Source: Edge of stochastic stability (2025), section 4 and appendix I.

    Example:
        >>> metric = BatchLambdaMax(nn.Linear(2, 1, bias=False), nn.functional.mse_loss)
        >>> for x in ([[1.0, 0.0]], [[0.0, 2.0]]):  # H_B = 2xxᵀ
        ...     metric.update(torch.tensor(x), torch.zeros(1, 1))
        >>> metric.compute().round(decimals=3)
        tensor(5., dtype=torch.float64)
    """

    @checked(tolerance=fraction("1e-3 gives eigenvalues to three digits"), curvature=CURVATURE)
    def __init__(
        self,
        model: nn.Module,
        loss_function: LossFunction,
        *,
        tolerance: float = 1e-3,
        curvature: Curvature = "hessian",
        **kwargs: Any,
    ) -> None:
        super().__init__(model, loss_function, curvature=curvature, **kwargs)
        self.tolerance = tolerance
        self.pairs: Eigenpairs | None = None

    def update(self, inputs: Any, targets: Any) -> None:  # type: ignore[override]
        """Add a mini-batch."""
        start: Sequence[Tensor] = self.pairs.vectors if self.pairs is not None else ()
        with closing(self._mini_batch(inputs, targets)) as batch:
            value, self.pairs = batch.largest_eigenvalue(self.tolerance, start)
        self._add(value)
