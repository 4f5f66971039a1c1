"""The block of parameters whose noise is measured, and the route that a measurement on it can take."""

import difflib
import math
import re
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_curvature.functional.noise.relation import FEWEST_POINTS
from lightning_curvature.losses.samples import BlockSamples
from lightning_curvature.monitors.modules import unwrapped
from lightning_curvature.noise.options import NoiseOptions, Pairing
from lightning_curvature.noise.sums import NOT_A_MEAN
from lightning_curvature.operators import NotSeparableError, linear_statistics
from lightning_curvature.operators.memory import available_memory

# D × D matrices in double precision that exist at once, an eigensolver's among them; those for pairs of mini-batches.
_MATRICES, _PAIR_MATRICES = 10, 10
# Share of the free memory that they may take.
_SHARE = 0.8
_NEAREST = 3
# The name that a parameter has under pruning or a parametrization.
_ORIGINAL = re.compile(r"(?:parametrizations\.)?(\w+)(?:\.original|_orig)$")

Named = Mapping[str, tuple[str, nn.Parameter]]


def named_parameters(module: nn.Module) -> Named:
    """Return full names and parameters, by the names that they have in a module that is not compiled."""
    named = module.named_parameters(remove_duplicate=False)
    return {unwrapped(name): (name, parameter) for name, parameter in named}


def find_block(name: str, named: Named) -> tuple[str, nn.Parameter]:
    """Return full name and parameter of the block, also under pruning or a parametrization; raise unless it is trained.

    Under both, the optimizer moves an original in the place of the parameter, which has another name.
    """
    plain = _ORIGINAL.sub(r"\1", name)
    path, dot, own = plain.rpartition(".")
    names = (name, plain, f"{plain}_orig", f"{path}{dot}parametrizations.{own}.original")
    found = next((named[other] for other in names if other in named), None)
    if found is None:
        near = difflib.get_close_matches(name, named, n=_NEAREST, cutoff=0.3) or list(named)[:_NEAREST]
        raise MisconfigurationException(
            f"parameter must be a name out of named_parameters(), got {name!r}: the nearest are {near}."
        )
    if not found[1].requires_grad:
        raise MisconfigurationException(
            f"parameter must require gradients, got the frozen {name!r}: unfreeze it or choose another."
        )
    return found


def check_block(options: NoiseOptions, named: Named, processes: int) -> None:
    """Raise unless the block exists, is trained, and has matrices that fit into the memory that processes share."""
    name, top = options.parameter, options.top
    _, block = find_block(name, named)
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
    limit = _SHARE * available_memory(block.device, processes)
    entry = 8 * (_MATRICES + options.pairs * _PAIR_MATRICES)
    if entry * size**2 > limit:
        most = math.isqrt(int(limit) // entry)
        fitting = [(p.numel(), other) for other, (_, p) in named.items() if FEWEST_POINTS <= p.numel() <= most]
        others = ", ".join(f"{other!r} ({count:,})" for count, other in sorted(fitting, reverse=True)[:_NEAREST])
        raise MisconfigurationException(
            f"parameter must be a block of at most {most:,} entries, whose square matrices fit into the "
            f"{limit / 2**30:.1f} GiB that there are for them, got {name!r} with {size:,} "
            f"({entry * size**2 / 2**30:.1f} GiB): choose {f'one of {others}' if others else 'a smaller one'}."
        )


def linear_layer(module: nn.Module, name: str) -> nn.Linear | None:
    """Return the linear layer whose weight has that full name, or None."""
    path, _, attribute = name.rpartition(".")
    layer = module.get_submodule(path)
    return layer if attribute == "weight" and isinstance(layer, nn.Linear) and path else None


def why_not_kronecker(layer: nn.Linear | None, batch: BlockSamples, batched: bool, processes: int) -> str:
    """Return why the block cannot take the Kronecker route, by a first batch; empty if it can."""
    if layer is None:
        return "it is no weight of a torch.nn.Linear"
    if not batch.is_mean(batched):
        return NOT_A_MEAN
    try:
        linear_statistics(layer, batch.whole, batch.size, processes, check=True)
    except NotSeparableError as error:
        return str(error)
    return ""


def pairing_of(options: NoiseOptions, batch: Any) -> tuple[Pairing | None, str]:
    """Return what pairs samples, None where that was not asked for, and why it cannot pair a first batch."""
    if not options.pairs:
        return None, ""
    pairing, why_not = options.pairing or inputs_and_labels, ""
    try:
        pairing(batch)
    except MisconfigurationException as error:
        why_not = str(error)
    return pairing, why_not


def inputs_and_labels(batch: object) -> tuple[Tensor, Tensor]:
    """Return inputs and labels of a batch, or raise a MisconfigurationException if it is no pair of them."""
    kind = f"a {type(batch).__name__}"
    if isinstance(batch, (list, tuple)) and len(batch) == 2:
        inputs, labels = batch
        if isinstance(inputs, Tensor) and isinstance(labels, Tensor):
            if labels.ndim == 1 and not labels.is_floating_point():
                return inputs, labels
            kind = f"targets of {labels.dtype} and shape {tuple(labels.shape)}"
    raise MisconfigurationException(
        f"batches must be pairs of inputs and class labels for 'noise_awd_chain', got {kind}: give pairing= a callable "
        "batch → (inputs, labels), or leave the quantity out."
    )


def batch_size_of(trainer: pl.Trainer, loader: Any) -> int | None:
    """Return the batch size of a loader, or of the Trainer's where it is None; None where it has none."""
    size = getattr(loader if loader is not None else trainer.train_dataloader, "batch_size", None)
    return size if isinstance(size, int) else None
