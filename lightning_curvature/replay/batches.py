"""Batches: their tensors in a fixed order, and copies that a step may write to."""

import copy
from collections.abc import Mapping
from typing import Any

from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_curvature.replay.objects import attributes


def tensors(batch: Any) -> list[Tensor]:
    """Return the tensors of a batch in a fixed order: nested tuples, lists, dicts and objects with fields."""
    if isinstance(batch, Tensor):
        return [batch]
    if isinstance(batch, (Mapping, list, tuple)):
        elements = batch.values() if isinstance(batch, Mapping) else batch
        return [tensor for element in elements for tensor in tensors(element)]
    return [value for value in attributes(batch).values() if isinstance(value, Tensor)]


def copied(data: Any) -> Any:
    """Return a copy of a batch with all its containers and objects; tensors become leaves."""
    try:
        return copy.deepcopy(data, {id(t): _clone(t) for t in tensors(data)})
    except Exception:  # an object that refuses to be copied
        return apply_to_collection(data, Tensor, _clone)


def _clone(tensor: Tensor) -> Tensor:
    clone = tensor.detach().clone()
    # Inside ``torch.vmap`` the call is an error even where it changes nothing.
    return clone.requires_grad_() if tensor.requires_grad else clone
