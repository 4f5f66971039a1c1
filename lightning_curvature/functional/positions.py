"""Weighted means over the positions (samples, tokens, pixels) of a batch of outputs."""

from collections.abc import Callable

import torch
from torch import Tensor

# Positions are evaluated in pieces of this many numbers: however many tokens a batch holds, the temporaries of a large
# vocabulary stay below 64 MiB each in float32.
_ELEMENTS_PER_PIECE = 2**24


def position_means(
    statistics: Callable[..., tuple[Tensor, ...]], weights: Tensor | None, outputs: Tensor, *others: Tensor
) -> Tensor:
    """Return weighted means of q statistics of outputs (..., C), (q,), in at least float32.

    ``statistics`` maps the outputs and the others at p positions, (p, C) each, to q values a position, (p,) each.
    """
    components = outputs.shape[-1] if outputs.ndim > 1 else 1
    dtype = torch.promote_types(outputs.dtype, torch.float32)
    values = [value.detach().reshape(-1, components).to(dtype) for value in (outputs, *others)]
    positions = len(values[0])
    if weights is None:
        weights = values[0].new_ones(positions)
    elif weights.numel() != positions:
        raise ValueError(
            f"weights, or mask, must have one value for each of the {positions} positions of outputs, got "
            f"{weights.numel()}: give a mask of the outputs' shape without its last dimension."
        )
    weights = weights.detach().reshape(-1).to(dtype)
    rows = max(1, _ELEMENTS_PER_PIECE // max(1, components))
    total: Tensor | float = 0.0
    for w, *piece in zip(weights.split(rows), *(value.split(rows) for value in values), strict=True):
        # A position without weight counts for nothing, whatever it holds.
        total = total + torch.stack([w @ torch.where(w == 0.0, 0.0, value) for value in statistics(*piece)])
    return total / weights.sum()
