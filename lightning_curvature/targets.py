"""Which distribution the loss belongs to, and which positions count: read off the batch, checked by the loss."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_curvature.functional import Likelihood

IGNORED = -100  # the ignore_index of torch's cross-entropy

# A loss that equals a multiple of the mean negative log-likelihood to this tolerance is taken to be that multiple.
# bf16 losses carry three digits; label smoothing and penalties differ by far more than this.
_MATCH = 1e-2

Reduction = Literal["mean", "half_mean", "sum", "half_sum", "per_sample", "half_per_sample"]


@dataclass(frozen=True)
class OutputModel:
    """How the loss depends on the outputs.

    Attributes:
        likelihood: distribution whose negative log-likelihood the loss is.
        target: index of the target among the tensors of the batch, or None.
        reduction: how the loss sums the elements.
        class_dimension: dimension of ``outputs`` that holds the vector of one position.
    """

    likelihood: Likelihood
    target: int | None
    reduction: Reduction
    class_dimension: int = -1

    def arrange(self, outputs: Tensor) -> Tensor:
        """Return outputs as (..., C)."""
        return outputs.movedim(self.class_dimension, -1) if self.class_dimension != -1 else outputs

    def weights(self, batch: Any) -> Tensor | None:
        """Weight of each position, flat: 0 where the target is ignored. None where all count."""
        if self.likelihood != "categorical" or self.target is None:
            return None
        return (tensors(batch)[self.target] != IGNORED).reshape(-1)

    def scale(self, outputs: Tensor, weights: Tensor | None) -> float:
        """The loss as a multiple of the mean negative log-likelihood of a position (½‖z−y‖² for a Gaussian)."""
        arranged = self.arrange(outputs)
        components = arranged.shape[-1] if arranged.ndim > 1 else 1
        positions = arranged.numel() // components if weights is None else int(weights.sum())
        return _scale(self.likelihood, self.reduction, components, positions, outputs.shape[0])

    def residual(self, outputs: Tensor, batch: Any) -> Tensor:
        """Derivative ∂ℓ/∂z of each position's negative log-likelihood, (P, C): p − y, or z − y.

        Where no target is known the likeliest outcome stands in for it.
        """
        z = self.arrange(outputs).detach()
        z = z.reshape(-1, z.shape[-1] if z.ndim > 1 else 1).float()
        target = None if self.target is None else tensors(batch)[self.target]
        if self.likelihood == "categorical":
            labels = z.argmax(-1) if target is None else target.reshape(-1).long().clamp_min(0)
            return z.softmax(-1) - F.one_hot(labels, z.shape[-1])
        mean = z.sigmoid() if self.likelihood == "bernoulli" else z
        if target is None:
            return mean - mean.round() if self.likelihood == "bernoulli" else mean
        return mean - target.reshape(z.shape).float()


def _scale(likelihood: str, reduction: Reduction, components: int, positions: int, samples: int) -> float:
    # torch's element of a squared error is (z−y)², twice the Gaussian one; a class index is one element a position.
    element = 2.0 if likelihood == "gaussian" else 1.0
    parts = 1 if likelihood == "categorical" else components
    half = 0.5 if reduction.startswith("half") else 1.0
    kind = reduction.removeprefix("half_")
    if kind == "mean":
        return element * half / parts
    return element * half * positions / (1 if kind == "sum" else samples)


def tensors(batch: Any) -> list[Tensor]:
    """Return the tensors of a batch in a fixed order: nested tuples, lists, dicts and objects with fields."""
    return list(_walk(batch))


def _walk(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _walk(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _walk(item)
    elif hasattr(value, "__dict__"):
        for item in vars(value).values():
            if isinstance(item, Tensor):
                yield item


def identify(outputs: Tensor, batch: Any, loss: Tensor | None, likelihood: str) -> OutputModel | None:
    """Find likelihood, target and reduction of a loss from one step.

    Every reading of the batch that fits by shape and type is tried; the one that reproduces the loss wins. Where none
    does (label smoothing, class weights, extra terms), a categorical or named likelihood keeps the mean reduction.

    Args:
        outputs: outputs of the step.
        batch: the batch.
        loss: loss of the step, or None where it is not known.
        likelihood: "auto" or a likelihood.

    Returns:
        The model, or None where "auto" finds nothing that fits.
    """
    readings = list(_readings(outputs, tensors(batch), likelihood))
    if loss is not None and outputs.is_floating_point():
        scored = [(_mismatch(outputs, tensors(batch), loss, r), i, r) for i, r in enumerate(readings)]
        fitting = [entry for entry in scored if entry[0] < _MATCH]
        if fitting:
            return min(fitting)[2]
    plain = [r for r in readings if r.reduction == "mean"]
    if likelihood != "auto":
        named: Likelihood = likelihood  # type: ignore[assignment]
        return plain[0] if plain else OutputModel(named, None, "mean")
    categorical = [r for r in plain if r.likelihood == "categorical"]
    if categorical:
        return categorical[0]
    vectors = outputs.ndim > 1 and outputs.shape[-1] > 1
    floats_like_outputs = any(t.is_floating_point() and t.shape == outputs.shape for t in tensors(batch))
    if vectors and not floats_like_outputs and any(_is_integer(t) for t in tensors(batch)):
        return OutputModel("categorical", None, "mean")
    return None


def _is_integer(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() and not tensor.is_complex() and tensor.dtype != torch.bool


def _readings(outputs: Tensor, batch: list[Tensor], likelihood: str) -> Iterator[OutputModel]:
    for index, target in enumerate(batch):
        if likelihood in ("auto", "categorical") and _is_integer(target) and outputs.ndim > 1:
            dimension = _class_dimension(outputs, target)
            if dimension is not None:
                for reduction in ("mean", "sum", "per_sample"):
                    yield OutputModel("categorical", index, reduction, dimension)  # type: ignore[arg-type]
        if target.numel() != outputs.numel() or target.is_complex():
            continue
        if likelihood in ("auto", "gaussian"):
            for reduction in ("mean", "half_mean", "sum", "half_sum", "per_sample", "half_per_sample"):
                yield OutputModel("gaussian", index, reduction)  # type: ignore[arg-type]
        if likelihood in ("auto", "bernoulli"):
            for reduction in ("mean", "sum", "per_sample"):
                yield OutputModel("bernoulli", index, reduction)  # type: ignore[arg-type]


def _class_dimension(outputs: Tensor, target: Tensor) -> int | None:
    if outputs.shape[-1] > 1 and target.numel() * outputs.shape[-1] == outputs.numel():
        same = target.shape == outputs.shape[:-1]
        if same or outputs.ndim == 2 or target.ndim == 1:
            return -1
    if outputs.ndim > 2 and target.shape == outputs.shape[:1] + outputs.shape[2:]:
        return 1
    return None


def _mismatch(outputs: Tensor, batch: list[Tensor], loss: Tensor, model: OutputModel) -> float:
    """Relative distance of the loss from what the reading says it should be."""
    assert model.target is not None
    target = batch[model.target]
    z = model.arrange(outputs.detach()).float()
    z = z.reshape(-1, z.shape[-1] if z.ndim > 1 else 1)
    weights = model.weights(batch)
    if model.likelihood == "categorical":
        labels = target.reshape(-1).long()
        counted = labels[labels != IGNORED]
        if counted.numel() == 0 or int(counted.min()) < 0 or int(counted.max()) >= z.shape[-1]:
            return math.inf
        value = F.cross_entropy(z, labels, ignore_index=IGNORED)
    else:
        y = target.reshape(z.shape).float()
        if model.likelihood == "gaussian":
            value = 0.5 * (z - y).square().sum(-1).mean()
        else:
            if bool((y < 0).any()) or bool((y > 1).any()):
                return math.inf
            value = F.binary_cross_entropy_with_logits(z, y, reduction="none").sum(-1).mean()
    expected = float(value) * model.scale(outputs, weights)
    distance = abs(expected - float(loss.detach()))
    return distance / max(abs(expected), 1e-30)
