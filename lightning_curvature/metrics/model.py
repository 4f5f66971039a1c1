"""Base of the metrics that differentiate a model themselves."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from torchmetrics import Metric

from lightning_curvature.operators import Curvature, MicroBatch, micro_batches, operator_type


class ModelMetric(Metric):
    """Keeps a model and its loss, and what kind of curvature is meant.

    Args:
        model: maps inputs to outputs.
        loss_function: mean loss of (outputs, targets).
        curvature: "hessian" or "gauss_newton".
        **kwargs: of ``torchmetrics.Metric``.

    Raises:
        ValueError: for an unknown ``curvature``.
    """

    # Attributes that a copy has in common with the original.
    _shared: ClassVar[tuple[str, ...]] = ("_model",)

    def __init__(
        self,
        model: nn.Module,
        loss_function: Callable[[Tensor, Any], Tensor],
        *,
        curvature: Curvature = "hessian",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        # In a list: the model is no part of the metric, which is moved and reset by itself.
        self._model = [model]
        self._loss_function = loss_function
        self._operator_type = operator_type(curvature)

    def _parts(self, batches: Sequence[tuple[Any, Any]]) -> list[MicroBatch]:
        return micro_batches(self._model[0], self._loss_function, batches)

    def _trained(self) -> list[Tensor]:
        return [p for p in self._model[0].parameters() if p.requires_grad]

    def __deepcopy__(self, memo: dict[int, Any]) -> "ModelMetric":
        """Copy all but the model: a clone measures the model that is trained, not what it was."""
        for name in self._shared:
            memo[id(getattr(self, name))] = getattr(self, name)
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__({name: copy.deepcopy(value, memo) for name, value in self.__getstate__().items()})
        return copied
