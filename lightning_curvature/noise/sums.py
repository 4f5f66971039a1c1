"""Sums over samples of what the noise covariance and the Hessian of a block are made of; they add up over ranks."""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_curvature.functional.noise import (
    DualitySums,
    KroneckerSum,
    duality_terms,
    linear_blocks,
    matched_pairs,
    unpacked,
)
from lightning_curvature.linalg import VectorSpace
from lightning_curvature.losses.samples import BlockSamples, SampleGraphs
from lightning_curvature.noise.linear_layer import LinearStatistics, SeveralUsesError, linear_statistics
from lightning_curvature.noise.problem import Block, NoiseProblem
from lightning_curvature.operators.graphs import products_at_once, products_with
from lightning_curvature.operators.micro_batches import building_graphs

Sums = dict[str, Tensor]
NOT_A_MEAN = "the loss of a batch is not the mean of those of its samples"


class NoiseMoments(NamedTuple):
    """Means over the samples of all ranks.

    Attributes:
        samples: n.
        gradient: ḡ, (D,).
        products: E[g gᵀ], (D, D).
        hessian: H = E[h], (D, D).
        second: E[h²], (D, D); None where it was not summed.
        duality: of pairs of mini-batches; None where it was not asked for.
        unpaired: share of the samples that had no partner of their class.
    """

    samples: int
    gradient: Tensor
    products: Tensor
    hessian: Tensor
    second: Tensor | None
    duality: DualitySums | None
    unpaired: float


def sum_device(block: Block) -> torch.device:
    """Where sums are made: on the device of the block, if that computes in double precision."""
    device = block.parameter.device
    return torch.device("cpu") if device.type == "mps" else device


def batches(problem: NoiseProblem) -> Iterator[BlockSamples]:
    """This rank's micro-batches, one after the other."""
    for probe in problem.probe_set.batches:
        yield BlockSamples(problem.loss, probe)
        problem.on_batch()


def kronecker_route(problem: NoiseProblem) -> Sums:
    """Sum over this rank's samples by the factors of a linear layer: nothing of the size D × D for a sample.

    Args:
        problem: with a layer.

    Raises:
        SeveralUsesError: if the layer is used otherwise than once a sample in some batch, or its loss is no mean.
    """
    layer = problem.layer
    assert layer is not None
    device, (out, into) = sum_device(problem), layer.weight.shape
    gradient = torch.zeros(out, into, dtype=torch.float64, device=device)
    moments = KroneckerSum(3, out, into, device)
    duality = DualitySums(out, into, device) if problem.pairing is not None else None
    samples, unpaired, processes = 0, 0, problem.trainer.num_devices
    for batch in batches(problem):
        losses: list[Tensor] = []
        found = linear_statistics(layer, functools.partial(_noted, batch, losses), batch.size, processes)
        # Of each: class weights, for example, show in those batches alone that hold several classes.
        if not batch.is_mean(problem.at_once, losses.pop()):
            raise SeveralUsesError(NOT_A_MEAN)
        found = LinearStatistics(*(t.to(device, torch.float64) for t in vars(found).values()))
        gradient += found.gradients.mT @ found.activations
        moments.add(linear_blocks(found.activations, found.gradients, found.curvatures), found.activations)
        samples += batch.size
        if duality is not None and problem.pairing is not None:
            unpaired += _add_pairs(duality, layer.weight.detach().to(device), found, problem.pairing(batch.batch))
    counts = gradient.new_tensor([samples, unpaired])
    sums = {"gradient": gradient.flatten(), "kronecker": moments.packed(), "counts": counts}
    return sums | ({"duality": duality.state} if duality is not None else {})


def _noted(batch: BlockSamples, losses: list[Tensor]) -> Tensor:
    losses.append(batch.whole())
    return losses[-1]


def general_route(problem: NoiseProblem) -> Sums:
    """Sum over this rank's samples by per-sample gradients, and products of the Hessian with all D unit vectors."""
    device, parameter = sum_device(problem), problem.parameter
    size = parameter.numel()
    gradient = torch.zeros(size, dtype=torch.float64, device=device)
    products, hessian = gradient.new_zeros(size, size), gradient.new_zeros(size, size)
    space = VectorSpace([parameter])
    units = products_at_once(space, problem.trainer.num_devices)
    samples = 0
    for batch in batches(problem):
        rows = torch.cat([graphs.gradients.detach() for graphs in batch.graphs(parameter, problem.at_once)])
        rows = rows.to(device, torch.float64)
        gradient += rows.sum(0)
        products.addmm_(rows.mT, rows)
        hessian += batch.size * _block_hessian(batch, problem, space, units).to(device, torch.float64)
        samples += batch.size
    return {
        "gradient": gradient,
        "products": products,
        "hessian": hessian,
        "counts": gradient.new_tensor([samples, 0.0]),
    }


def _block_hessian(batch: BlockSamples, problem: NoiseProblem, space: VectorSpace, at_once: int) -> Tensor:
    """Hessian of the mean loss of the samples by the block, (D, D), from products with unit vectors."""
    parameter = problem.parameter
    size = parameter.numel()
    with building_graphs():
        loss = batch.mean(problem.at_once)
        (gradient,) = torch.autograd.grad(loss, parameter, create_graph=True)
    found = []
    for first in range(0, size, at_once):
        units = torch.zeros(min(at_once, size - first), size, dtype=space.dtype, device=space.device)
        units[:, first:].fill_diagonal_(1.0)
        with building_graphs():
            found.append(products_with([gradient], [parameter], space, units))
    hessian = torch.cat(found)
    return 0.5 * (hessian + hessian.mT)


def squared_products(problem: NoiseProblem, vectors: Tensor) -> Tensor:
    r"""Sum of ‖h_p v_i‖² over this rank's samples, which is the diagonal of Σ h_p² in the basis v, (𝒩,) float64."""
    total = torch.zeros(len(vectors), dtype=torch.float64, device=vectors.device)
    space = VectorSpace([problem.parameter])
    for batch in batches(problem):
        for graphs in batch.graphs(problem.parameter, problem.at_once):
            total += _squares(graphs, vectors, products_at_once(space, problem.trainer.num_devices))
    return total


def _squares(graphs: SampleGraphs, vectors: Tensor, at_once: int) -> Tensor:
    step = max(1, at_once // len(graphs.gradients))
    device = graphs.gradients.device
    found = [
        graphs.products(vectors[first : first + step].to(device, graphs.gradients.dtype)).square().sum((1, 2))
        for first in range(0, len(vectors), step)
    ]
    return torch.cat(found).to(vectors.device, torch.float64)


def moments_of(sums: Sums, block: Block) -> NoiseMoments:
    """Make means of the sums of all ranks."""
    samples, unpaired = sums["counts"].tolist()
    common = {"samples": round(samples), "gradient": sums["gradient"] / samples, "unpaired": unpaired / samples}
    if "hessian" in sums:
        means = {name: sums[name] / samples for name in ("products", "hessian")}
        return NoiseMoments(second=None, duality=None, **means, **common)  # type: ignore[arg-type]
    out, into = block.parameter.shape
    products, hessian, second = unpacked(sums["kronecker"] / samples, out, into)
    duality = None
    if "duality" in sums:
        duality = DualitySums(out, into, sum_device(block))
        duality.state = sums["duality"]
    return NoiseMoments(products=products, hessian=hessian, second=second, duality=duality, **common)  # type: ignore[arg-type]


def inputs_and_labels(batch: object) -> tuple[Tensor, Tensor]:
    """Return what a batch (inputs, labels) holds.

    Raises:
        MisconfigurationException: if it is no such pair.
    """
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


def _add_pairs(duality: DualitySums, weight: Tensor, found: LinearStatistics, alike: tuple[Tensor, Tensor]) -> int:
    """Cut a batch into two mini-batches, pair each with the other, and return how many samples have no partner."""
    inputs, labels = (t.to(weight.device) for t in alike)
    # Class by class to both halves in turn: as balanced as may be.
    order = torch.sort(labels, stable=True).indices
    halves = order[0::2], order[1::2]
    missing = 0
    for own, other in (halves, halves[::-1]):
        partner = matched_pairs(inputs[own], labels[own], inputs[other], labels[other])
        paired = partner >= 0
        missing += int((~paired).sum())
        own, other = own[paired], other[partner[paired]]
        shifts = found.activations[other] - found.activations[own]
        own_curvatures = found.curvatures[own]
        duality.add(duality_terms(weight, found.activations[own], found.gradients[own], own_curvatures, shifts))
    return missing
