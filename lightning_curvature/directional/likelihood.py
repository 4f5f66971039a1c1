"""Likelihood, target and reduction of a loss, and which positions count: read off the batch, checked by the loss."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_curvature.functional import Likelihood
from lightning_curvature.replay.batches import tensors

IGNORED = -100  # the ignore_index of torch's cross-entropy

# A loss that equals a multiple of the mean negative log-likelihood to this tolerance (two roundings in half precision)
# is taken to be that multiple: float32 sums differ in the seventh digit by their order, penalties and weights show in
# the first four. A fitted network's loss is rounded at unit scale, log(1 + small), hence the absolute part.
_MATCH = 1e-4
_ABSOLUTE_MATCH = 1e-6
# The mismatch of a reading that cannot be compared at all.
_HOPELESS = 1e6
# A loss that is one n-th of a mean was divided by hand, as Lightning's guide to manual accumulation has it. The match
# must be closer: a loss of another kind falls within this distance of some 1/n up to the limit by chance once in 200.
_FRACTION_MATCH = 1e-5
_LARGEST_DIVISOR = 256

Reduction = Literal["mean", "half_mean", "sum", "half_sum", "per_sample", "half_per_sample"]
_REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)
_WHOLE = _REDUCTIONS[::2]


@dataclass(frozen=True)
class OutputModel:
    """How the loss depends on the outputs.

    Attributes:
        likelihood: distribution whose negative log-likelihood the loss is.
        target: index of the target among the tensors of the batch, or None.
        reduction: how the loss sums the elements.
        class_dimension: dimension of ``outputs`` that holds the vector of one position.
        factor: constant by which the step multiplies the loss.
        shift: positions by which the target runs ahead of the outputs: 1 where a language model predicts its input.
        reproduced: whether all that gives the loss that the step had.
        mismatch: |loss over what the reading says − 1| where it does not.
    """

    likelihood: Likelihood
    target: int | None
    reduction: Reduction
    class_dimension: int = -1
    factor: float = 1.0
    shift: int = 0
    reproduced: bool = True
    mismatch: float = field(default=0.0, compare=False)

    def arrange(self, outputs: Tensor | None) -> Tensor:
        """Return outputs as (..., C), without those that have no target; raise where an evaluation returned none."""
        if outputs is None:
            raise ValueError("outputs must come with every evaluation, got none in a repetition: return them always.")
        if self.shift:
            return outputs[:, : -self.shift]
        return outputs.movedim(self.class_dimension, -1) if self.class_dimension != -1 else outputs

    def weights(self, batch: Any) -> Tensor | None:
        """Return the weight of each position, flat: 0 where the target is ignored; None where all count."""
        if self.likelihood != "categorical" or self.target is None:
            return None
        return (self.targets(tensors(batch)) != IGNORED).reshape(-1)

    def targets(self, batch: list[Tensor]) -> Tensor:
        """Return the target among the tensors of a batch, in the order of the arranged outputs."""
        assert self.target is not None
        return batch[self.target][:, self.shift :] if self.shift else batch[self.target]

    def scale(self, outputs: Tensor, weights: Tensor | None) -> float:
        """Return the loss as a multiple of the mean negative log-likelihood of a position (½‖z−y‖² for a Gaussian)."""
        arranged = self.arrange(outputs)
        components = arranged.shape[-1] if arranged.ndim > 1 else 1
        positions = arranged.numel() // components if weights is None else int(weights.sum())
        # torch's element of a squared error is (z−y)², twice the Gaussian one; a class index is one element a position.
        element = 2.0 if self.likelihood == "gaussian" else 1.0
        half = 0.5 if self.reduction.startswith("half") else 1.0
        kind = self.reduction.removeprefix("half_")
        if kind == "mean":
            return self.factor * (element * half / (1 if self.likelihood == "categorical" else components))
        return self.factor * (element * half * positions / (1 if kind == "sum" else outputs.shape[0]))

    def residual(self, outputs: Tensor, batch: Any) -> Tensor:
        """Return the derivative ∂ℓ/∂z of each position's negative log-likelihood, (P, C): p − y, or z − y.

        Where no target is known the likeliest outcome stands in for it.
        """
        z = self.arrange(outputs).detach()
        z = z.reshape(-1, z.shape[-1] if z.ndim > 1 else 1).float()
        target = None if self.target is None else self.targets(tensors(batch))
        if self.likelihood == "categorical":
            # Ignored positions have no weight; their labels need only be some label.
            labels = z.argmax(-1) if target is None else target.reshape(-1).long().clamp(0, z.shape[-1] - 1)
            p, labels = z.softmax(-1), labels.unsqueeze(-1)
            return p.scatter_add_(-1, labels, -torch.ones_like(labels, dtype=p.dtype))
        mean = z.sigmoid() if self.likelihood == "bernoulli" else z
        if target is None:
            return mean - mean.round() if self.likelihood == "bernoulli" else mean
        return mean - target.reshape(z.shape).float()


def confirm(
    model: OutputModel, outputs: Tensor, batch: Any, loss: Tensor, likelihood: str, mask: Tensor | None = None
) -> OutputModel:
    """Return a reading after a check on another step: itself or another that holds, else itself as not reproduced.

    The first batch may fit several readings (one sample: mean and sum; no padding: any ignored index; equal logits: any
    class weights). Arguments are those of :func:`identify`.
    """
    if model.target is None:
        return model
    distance = abs(1.0 - _ratio(outputs, tensors(batch), loss, replace(model, factor=1.0), mask) / model.factor)
    if distance < max(_MATCH, 2.0 * torch.finfo(loss.dtype).eps):
        return model if model.reproduced else replace(model, mismatch=distance)
    other = identify(outputs, batch, loss, likelihood, mask)
    if other is not None and other.reproduced:
        return other
    return replace(model, reproduced=False, mismatch=min(distance, _HOPELESS))


def identify(
    outputs: Tensor, batch: Any, loss: Tensor | None, likelihood: str, mask: Tensor | None = None
) -> OutputModel | None:
    """Return likelihood, target and reduction of a loss, read off one step.

    Of all readings of the batch that fit by shape and type the one that reproduces the loss wins, then the one of which
    the loss is a whole fraction. Where none does (label smoothing, class weights, extra terms), a categorical or named
    likelihood keeps the mean reduction. The result is None where nothing fits "auto". ``mask`` holds the weight of each
    position where the objective gave them; ``loss`` is None where it is not known.
    """
    candidates = tensors(batch)
    readings = list(_readings(outputs, candidates, likelihood))
    ratios = [math.nan] * len(readings)
    if loss is not None and outputs.is_floating_point():
        ratios = [_ratio(outputs, candidates, loss, r, mask) for r in readings]
        tolerance = max(_MATCH, 2.0 * torch.finfo(loss.dtype).eps)
        fitting = [(abs(1.0 - ratio), i) for i, ratio in enumerate(ratios) if abs(1.0 - ratio) < tolerance]
        if fitting:
            return readings[min(fitting)[1]]
        divided = [(n, r) for n, r in zip(map(_divisor, ratios), readings, strict=True) if n and r.reduction == "mean"]
        if divided:
            n, reading = min(divided, key=lambda entry: entry[0])
            return replace(reading, factor=1.0 / n)
    plain = [
        # Without a loss there is nothing that a reading could mismatch.
        replace(reading, reproduced=False, mismatch=0.0 if math.isnan(ratio) else min(abs(1.0 - ratio), _HOPELESS))
        for reading, ratio in zip(readings, ratios, strict=True)
        if reading.reduction == "mean" and not reading.shift
    ]
    # Among several integer tensors (token ids beside labels) one with ignored positions is the target.
    plain.sort(key=lambda r: r.likelihood != "categorical" or not bool((r.targets(candidates) == IGNORED).any()))
    plain = [r for r in plain if likelihood != "auto" or r.likelihood == "categorical"]
    if plain:
        return plain[0]
    if likelihood != "auto":
        return OutputModel(likelihood, None, "mean", reproduced=False)  # type: ignore[arg-type]
    vectors = outputs.ndim > 1 and outputs.shape[-1] > 1
    like_outputs = any(t.is_floating_point() and t.shape == outputs.shape for t in candidates)
    classes = vectors and not like_outputs and any(map(_is_integer, candidates))
    return OutputModel("categorical", None, "mean", reproduced=False) if classes else None


def _is_integer(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() and not tensor.is_complex() and tensor.dtype != torch.bool


def _readings(outputs: Tensor, batch: list[Tensor], likelihood: str) -> Iterator[OutputModel]:
    """Yield every reading that fits by shape and type."""
    for index, target in enumerate(batch):
        if likelihood in ("auto", "categorical") and _is_integer(target) and outputs.ndim > 1:
            for dimension in _class_dimensions(outputs, target):
                yield from (OutputModel("categorical", index, way, dimension) for way in _WHOLE)
            if outputs.ndim == 3 and target.shape == outputs.shape[:2] and target.shape[1] > 1:
                yield from (OutputModel("categorical", index, way, shift=1) for way in _WHOLE)
        if target.numel() != outputs.numel() or target.is_complex():
            continue
        if likelihood in ("auto", "gaussian"):
            yield from (OutputModel("gaussian", index, way) for way in _REDUCTIONS)
        if likelihood in ("auto", "bernoulli"):
            yield from (OutputModel("bernoulli", index, way) for way in _WHOLE)


def _class_dimensions(outputs: Tensor, target: Tensor) -> Iterator[int]:
    """Yield the dimensions of the classes: last, as in (B, T, C), or second, as torch's cross-entropy takes images."""
    if outputs.shape[-1] > 1 and target.numel() * outputs.shape[-1] == outputs.numel():
        same = target.shape == outputs.shape[:-1]
        if same or outputs.ndim == 2 or target.ndim == 1:
            yield -1
    if outputs.ndim > 2 and target.shape == outputs.shape[:1] + outputs.shape[2:]:
        yield 1


def _divisor(ratio: float) -> int | None:
    """Return the whole number n > 1 of which ``ratio`` is the inverse, or None."""
    if not 0.5 / _LARGEST_DIVISOR < ratio < 1.0:
        return None
    n = round(1.0 / ratio)
    return n if 1 < n <= _LARGEST_DIVISOR and abs(n * ratio - 1.0) < _FRACTION_MATCH else None


def _ratio(outputs: Tensor, batch: list[Tensor], loss: Tensor, model: OutputModel, mask: Tensor | None = None) -> float:
    """Return the loss over what the reading says it should be; infinite where the reading is out of the question."""
    target = model.targets(batch)
    z = model.arrange(outputs.detach()).float()
    z = z.reshape(-1, z.shape[-1] if z.ndim > 1 else 1)
    weights = model.weights(batch) if mask is None else mask.reshape(-1)
    if model.likelihood == "categorical":
        labels = target.reshape(-1).long()
        counted = labels[labels != IGNORED]
        if counted.numel() == 0 or int(counted.min()) < 0 or int(counted.max()) >= z.shape[-1]:
            return math.inf
        rows = F.cross_entropy(z, labels, ignore_index=IGNORED, reduction="none")
    elif model.likelihood == "gaussian":
        rows = 0.5 * (z - target.reshape(z.shape).float()).square().sum(-1)
    else:
        y = target.reshape(z.shape).float()
        if bool((y < 0).any()) or bool((y > 1).any()):
            return math.inf
        rows = F.binary_cross_entropy_with_logits(z, y, reduction="none").sum(-1)
    value = rows.mean() if weights is None else (weights * rows).sum() / weights.sum()
    expected = float(value) * model.scale(outputs, weights)
    actual = float(loss.detach())
    if model.likelihood != "gaussian" and abs(actual - expected) < _ABSOLUTE_MATCH:
        return 1.0 + (actual - expected)  # still the closest of several wins
    return actual / expected if expected > 0.0 else math.inf
