"""Batches: their tensors in a fixed order, and copies that a step may write to."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor


def tensors(batch: Any) -> list[Tensor]:
    """Return the tensors of a batch in a fixed order: nested tuples, lists, dicts and objects with fields."""
    return list(_walk(batch))


def _walk(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _walk(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _walk(item)
    elif hasattr(value, "__dict__"):
        for item in vars(value).values():
            if isinstance(item, Tensor):
                yield item


def _clone(tensor: Tensor) -> Tensor:
    clone = tensor.detach().clone()
    # Not at all where it would change nothing: inside ``torch.vmap`` it is an error.
    return clone.requires_grad_() if tensor.requires_grad else clone


def copied(data: Any) -> Any:
    """Copy a batch with all its containers and objects; tensors become leaves."""
    try:
        return copy.deepcopy(data, {id(t): _clone(t) for t in tensors(data)})
    except Exception:  # an object that refuses to be copied
        return apply_to_collection(data, Tensor, _clone)
