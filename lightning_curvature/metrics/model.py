"""Bases of the metrics: flags for torchmetrics, and a model that the metric differentiates itself."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from torchmetrics import Metric

from lightning_curvature.operators import Curvature, MicroBatch, micro_batches, operator_type

LossFunction = Callable[[Tensor, Any], Tensor]


class CurvatureMetric(Metric):
    """Base of all metrics here: values have no gradient, and none is better than another."""

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Return figure and axes of a plot of ``val``, a value of ``compute`` or a sequence of them.

        Without ``val`` the plot shows ``compute()`` now; ``ax`` are matplotlib axes to draw into.
        """
        return self._plot(val, ax)


class ModelMetric(CurvatureMetric):
    """A metric that keeps a model and its loss, and differentiates them at the parameters as they are.

    Arguments and errors are those of :class:`~lightning_curvature.metrics.BatchSharpness`.
    """

    # Attributes that a copy shares with the original.
    _shared: ClassVar[tuple[str, ...]] = ("_model",)

    def __init__(
        self, model: nn.Module, loss_function: LossFunction, *, curvature: Curvature = "hessian", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        # A list hides the model from ``nn.Module``: moving or resetting the metric leaves it alone.
        self._model = [model]
        self._loss_function = loss_function
        self._operator_type = operator_type(curvature)

    def _micro_batches(self, batches: Sequence[tuple[Any, Any]]) -> list[MicroBatch]:
        return micro_batches(self._model[0], self._loss_function, batches)

    def _trained(self) -> list[Tensor]:
        return [p for p in self._model[0].parameters() if p.requires_grad]

    def __deepcopy__(self, memo: dict[int, Any]) -> "ModelMetric":
        """Copy all but the model: a clone measures the model in training, not a snapshot of it."""
        for name in self._shared:
            memo[id(getattr(self, name))] = getattr(self, name)
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__({name: copy.deepcopy(value, memo) for name, value in self.__getstate__().items()})
        return copied
