"""Bases of the metrics: what torchmetrics expects of all, and a model that the metric differentiates itself."""

import copy
import functools
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map, tree_map_only
from torchmetrics import Metric
from torchmetrics.utilities.exceptions import TorchMetricsUserError

from lightning_curvature.arguments import checked, sentence
from lightning_curvature.operators import Curvature, MicroBatch, micro_batches, operator_type
from lightning_curvature.operators.exact import CURVATURE

LossFunction = Callable[[Tensor, Any], Tensor]
Batch = tuple[Any, Any]


class CurvatureMetric(Metric):
    """Base of all metrics here: values have no gradient, and none is better than another.

    ``update`` adds all of its arguments or, where it raises, nothing. ``forward`` adds them, and returns their own
    value: of this rank, or of all ranks with ``dist_sync_on_step=True``. States keep their types, float64 for sums.
    They are replaced, never written in place, so that keeping a reference keeps a value.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    # Whether ``compute`` is called for ``forward``.
    _for_forward = False
    # States that one ``update`` leaves for the next, which ``forward`` does not begin afresh.
    _carried: ClassVar[tuple[str, ...]] = ()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Add the arguments of ``update``, and return their value alone."""
        if self._is_synced:
            raise TorchMetricsUserError("forward must not be called while states are synced, got a call: unsync first.")
        before, count = self._copy_state_dict(), self._update_count
        fresh = {name: default for name, default in self._defaults.items() if name not in self._carried}
        for name, default in fresh.items():
            # A list of its own: ``reset`` empties lists in place.
            setattr(self, name, default.clone() if isinstance(default, Tensor) else [])
        try:
            self.update(*args, **kwargs)
        except BaseException:
            self._set_states(before)
            raise
        to_sync, self._to_sync, self._for_forward = self._to_sync, self.dist_sync_on_step, True
        try:
            self._forward_cache = self.compute()
        finally:
            self._to_sync, self._for_forward, self._computed = to_sync, False, None
            carried = {name: getattr(self, name) for name in self._carried}
            self._reduce_states(before)
            self._set_states(carried)
            self._update_count = count + 1
        return self._forward_cache

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add the states of another metric of this class, or a dict of them; raise ValueError unless they fit."""
        before, states = self._copy_state_dict(), incoming_state
        if isinstance(incoming_state, type(self)):
            states = incoming_state.metric_state
        try:
            if not isinstance(states, dict) or not self._defaults.keys() <= states.keys():
                raise TypeError(f"not all of {', '.join(self._defaults)}")
            self._reduce_states(states)
        except (RuntimeError, TypeError) as error:
            self._set_states(before)
            wanted = f"be a {type(self).__name__} or a dict of its states, of the same sizes"
            shown = f"a {type(incoming_state).__name__} ({error})"
            raise sentence("incoming_state", wanted, shown, "merge metrics that are made alike") from None
        self._update_count += getattr(incoming_state, "_update_count", 1)
        self._computed = None

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Return figure and axes of a plot of ``val``, a value of ``compute`` or a sequence of them.

        Without ``val`` the plot shows ``compute()`` now; ``ax`` are matplotlib axes to draw into.
        """
        # torchmetrics draws tensors alone.
        tensors = tree_map(
            lambda number: torch.as_tensor(number, dtype=torch.float64), self.compute() if val is None else val
        )
        return self._plot(tensors, ax)

    def reset(self) -> None:
        """Forget all updates."""
        # New lists: torchmetrics would empty those that a wrapper has taken over.
        self._set_states({name: [] for name in self._lists})
        super().reset()

    @contextmanager
    def sync_context(self, *args: Any, should_unsync: bool = True, **kwargs: Any) -> Generator[None, None, None]:
        """Hold the states merged over the ranks; each rank has its own again at the end, also after an error."""
        self.sync(*args, **kwargs)
        try:
            yield
        finally:
            self.unsync(should_unsync=self._is_synced and should_unsync)

    def _over_ranks(self) -> Any:
        """Return a context that holds the states merged over all ranks, as ``compute`` does."""
        return self.sync_context(self.dist_sync_fn, should_sync=self._to_sync, should_unsync=self._should_unsync)

    def _wrap_update(self, update: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(update)
        def all_or_nothing(*args: Any, **kwargs: Any) -> None:
            before = self._copy_state_dict()
            try:
                update(*args, **kwargs)
            except BaseException:
                self._set_states(before)
                self._update_count -= 1
                raise

        return super()._wrap_update(all_or_nothing)

    @property
    def _lists(self) -> list[str]:
        """Names of the states that hold batches."""
        return [name for name, default in self._defaults.items() if isinstance(default, list)]

    def _copy_state_dict(self) -> dict[str, Tensor | list[Any]]:
        return {name: getattr(self, name) for name in self._defaults}

    def _set_states(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            setattr(self, name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        """Move states to another device; a change of type, which torchmetrics guards in part, would round sums."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        applied = super()._apply(move, exclude_state=[*exclude_state, *self._lists])
        # Batches may be trees of tensors.
        self._set_states({name: tree_map_only(Tensor, move, getattr(self, name)) for name in self._lists})
        return applied


def as_draws(device: torch.device, **values: Tensor | float) -> list[Tensor]:
    """Return numbers, or vectors with an entry for each draw, as (n,) float64 each; the first of them says how many."""
    vectors = {name: torch.as_tensor(value, dtype=torch.float64, device=device) for name, value in values.items()}
    first, count = next((name, vector.numel()) for name, vector in vectors.items())
    for name, vector in vectors.items():
        if vector.ndim > 1 or vector.numel() not in (1, count):
            wanted = "be a number or a vector" + f" of {count}, as {first}" * (name != first)
            raise sentence(name, wanted, f"shape {tuple(vector.shape)}", "take means over samples first")
    return [vector.reshape(-1).expand(count) for vector in vectors.values()]


class ModelMetric(CurvatureMetric):
    """A metric that keeps a model and its loss, and differentiates them at the parameters as they are.

    It does so under ``no_grad`` and ``inference_mode``, too, as in a validation step of Lightning. Arguments and errors
    are those of :class:`~lightning_curvature.metrics.BatchSharpness`.
    """

    # Attributes that a copy shares with the original.
    _shared: ClassVar[tuple[str, ...]] = ("_model",)

    apart: Tensor

    @checked(curvature=CURVATURE)
    def __init__(
        self, model: nn.Module, loss_function: LossFunction, *, curvature: Curvature = "hessian", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        # A list hides the model from ``nn.Module``: moving or resetting the metric leaves it alone.
        self._model = [model]
        self._loss_function = loss_function
        self._operator_type = operator_type(curvature)
        # MetricCollection merges metrics whose states are close after the first batch, and updates only one of them.
        # NaN is close to nothing.
        self.add_state("apart", torch.tensor(torch.nan, dtype=torch.float64), dist_reduce_fx="max")

    def _micro_batches(self, batches: Sequence[Batch]) -> list[MicroBatch]:
        return micro_batches(self._model[0], self._loss_function, batches)

    def _trained(self) -> list[Tensor]:
        return [p for p in self._model[0].parameters() if p.requires_grad]

    def _wrap_update(self, update: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(update)
        def differentiable(*args: Any, **kwargs: Any) -> None:
            with torch.inference_mode(False):
                update(*_usable(args), **_usable(kwargs))

        return super()._wrap_update(differentiable)

    def _wrap_compute(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        return torch.inference_mode(False)(super()._wrap_compute(compute))

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        """Gather sums, and leave batches on their ranks."""
        every = self._reductions
        self._reductions = {name: every[name] for name in every if name not in self._lists}
        try:
            super()._sync_dist(*args, **kwargs)
        finally:
            self._reductions = every

    def _move_list_states_to_cpu(self) -> None:
        """Leave batches on the device of the model, which evaluates them."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "ModelMetric":
        """Copy all but the model: a clone measures the model in training, not a snapshot of it."""
        for name in self._shared:
            memo[id(getattr(self, name))] = getattr(self, name)
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__({name: copy.deepcopy(value, memo) for name, value in self.__getstate__().items()})
        return copied


def _usable(arguments: Any) -> Any:
    """Return arguments with copies of tensors of the inference mode, which autograd refuses."""
    return tree_map_only(Tensor, lambda leaf: leaf.clone() if leaf.is_inference() else leaf, arguments)
