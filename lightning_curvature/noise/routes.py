"""The block of parameters whose noise is measured: which it is, whether it fits into memory, which route it takes."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_curvature.functional.noise.relation import FEWEST_POINTS
from lightning_curvature.losses.samples import BlockSamples
from lightning_curvature.noise.linear_layer import SeveralUsesError, linear_statistics
from lightning_curvature.noise.sums import NOT_A_MEAN
from lightning_curvature.operators.memory import available_memory

# Matrices of D × D numbers in double precision that there are at one time, with what an eigensolver takes; and those of
# pairs of mini-batches.
_MATRICES, _OF_PAIRS = 10, 10
# Share of the free memory that they may take.
_SHARE = 0.8
_NEAREST = 3


def named_parameters(module: nn.Module) -> dict[str, tuple[str, nn.Parameter]]:
    """Full names and parameters by the names that they have in a module that is not compiled."""
    found = module.named_parameters(remove_duplicate=False)
    return {name.replace("_orig_mod.", ""): (name, parameter) for name, parameter in found}


def check_block(
    named: Mapping[str, tuple[str, nn.Parameter]], name: str, *, top: int | None, pairs: bool, processes: int
) -> None:
    """Check that a block is there, is trained, and has matrices that fit into memory.

    Args:
        named: of :func:`named_parameters`.
        name: of the block.
        top: 𝒩.
        pairs: whether mini-batches are paired.
        processes: how many share the machine's memory.

    Raises:
        MisconfigurationException: if not.
    """
    if name not in named:
        near = difflib.get_close_matches(name, named, n=_NEAREST, cutoff=0.3) or list(named)[:_NEAREST]
        raise MisconfigurationException(
            f"parameter must be a name out of named_parameters(), got {name!r}: the nearest are {near}."
        )
    _, block = named[name]
    if not block.requires_grad:
        raise MisconfigurationException(
            f"parameter must require gradients, got the frozen {name!r}: unfreeze it or choose another."
        )
    size = block.numel()
    if top is not None and top > size:
        raise MisconfigurationException(
            f"top must be at most the number of entries, got {top} of {size}: lower it, or leave it out."
        )
    if size < FEWEST_POINTS:
        raise MisconfigurationException(
            f"parameter must have at least {FEWEST_POINTS} entries for a power law, got {name!r} with {size}: choose a "
            "weight."
        )
    limit, entry = _SHARE * available_memory(block.device, processes), 8 * (_MATRICES + pairs * _OF_PAIRS)
    if entry * size**2 > limit:
        most = math.isqrt(int(limit) // entry)
        sizes = ((p.numel(), n) for n, (_, p) in named.items())
        fitting = sorted((one for one in sizes if FEWEST_POINTS <= one[0] <= most), reverse=True)
        others = ", ".join(f"{other!r} ({count:,})" for count, other in fitting[:_NEAREST])
        raise MisconfigurationException(
            f"parameter must be a block of at most {most:,} entries, whose square matrices fit into the "
            f"{limit / 2**30:.1f} GiB that there are for them, got {name!r} with {size:,} "
            f"({entry * size**2 / 2**30:.1f} GiB): choose {f'one of {others}' if others else 'a smaller one'}."
        )


def linear_layer(module: nn.Module, name: str) -> nn.Linear | None:
    """Return the linear layer whose weight has that name."""
    path, _, own = name.rpartition(".")
    layer = module.get_submodule(path)
    return layer if own == "weight" and isinstance(layer, nn.Linear) and path else None


def why_not_kronecker(layer: nn.Linear, batch: BlockSamples, at_once: bool, processes: int) -> str:
    """Return why the Kronecker route cannot be taken; empty where it can."""
    if not batch.is_mean(at_once):
        return NOT_A_MEAN
    try:
        linear_statistics(layer, batch.whole, batch.size, processes, check=True)
    except SeveralUsesError as error:
        return str(error)
    return ""


def batch_size_of(trainer: pl.Trainer, loader: Any) -> int | None:
    """Return the batch size of a loader, or where it is None of the Trainer's; None where it has none."""
    size = getattr(loader if loader is not None else trainer.train_dataloader, "batch_size", None)
    return size if isinstance(size, int) else None
