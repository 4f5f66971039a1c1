"""Sums over samples that make up the noise covariance and the Hessian of a block; sums of several ranks add up."""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
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
from lightning_curvature.noise.linear_layer import LinearStatistics, NotSeparableError, linear_statistics
from lightning_curvature.noise.problem import NoiseProblem
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
        duality: sums over pairs of mini-batches; None where they were not asked for.
        unpaired: share of the samples that have no partner of their class.
    """

    samples: int
    gradient: Tensor
    products: Tensor
    hessian: Tensor
    second: Tensor | None
    duality: DualitySums | None
    unpaired: float


def sum_device(parameter: Tensor) -> torch.device:
    """Return the device of the sums: that of the block if it computes in double precision, else the CPU."""
    return torch.device("cpu") if parameter.device.type == "mps" else parameter.device


def own_sums(problem: NoiseProblem) -> Sums:
    """Return the sums over this rank's samples, by the route of the problem.

    Among them are ``counts``: samples, samples without a partner, and 0 for a rank that can take the route.

    Raises:
        NotSeparableError: on the Kronecker route, if the samples of some batch cannot take it.
    """
    return general_route(problem) if problem.layer is None else kronecker_route(problem)


def no_sums(problem: NoiseProblem) -> Sums:
    """Return zeros of the shapes of :func:`own_sums`, which take no memory."""
    zero = torch.zeros((), dtype=torch.float64, device=problem.device)
    size = problem.parameter.numel()
    shapes: dict[str, tuple[int, ...]] = {"gradient": (size,), "counts": (3,)}
    if problem.layer is None:
        shapes |= {"products": (size, size), "hessian": (size, size)}
    else:
        out, into = problem.layer.weight.shape
        shapes["kronecker"] = (3, out * (out + 1) // 2, into * (into + 1) // 2)
        if problem.pairing is not None:
            shapes["duality"] = DualitySums(out, into, "meta").state.shape
    return {name: zero.expand(shape) for name, shape in shapes.items()}


def _batches(problem: NoiseProblem) -> Iterator[BlockSamples]:
    """This rank's micro-batches, one after the other."""
    for probe in problem.probe_set.batches:
        yield BlockSamples(problem.loss, probe)
        problem.on_batch()


def kronecker_route(problem: NoiseProblem) -> Sums:
    """Sum over this rank's samples by the factors of a linear layer: nothing of the size D × D for a sample."""
    layer, device = problem.layer, problem.device
    assert layer is not None
    out, into = layer.weight.shape
    gradient = torch.zeros(out, into, dtype=torch.float64, device=device)
    moments, duality = KroneckerSum(3, out, into, device), None
    if problem.pairing is not None:
        duality = DualitySums(out, into, device)
    samples, unpaired, processes = 0, 0, problem.trainer.num_devices
    for batch in _batches(problem):
        losses: list[Tensor] = []
        layer_sees = linear_statistics(layer, functools.partial(_noted, batch, losses), batch.size, processes)
        # In every batch: class weights, for example, show only in those of several classes.
        if not batch.is_mean(problem.batched, losses.pop()):
            raise NotSeparableError(NOT_A_MEAN)
        statistics = LinearStatistics(*(t.to(device, torch.float64) for t in vars(layer_sees).values()))
        a, delta = statistics.activations, statistics.gradients
        gradient += delta.mT @ a
        moments.add(linear_blocks(a, delta, statistics.curvatures), a)
        samples += batch.size
        if duality is not None and problem.pairing is not None:
            inputs, labels = problem.pairing(batch.batch)
            unpaired += _add_pairs(duality, layer.weight.detach().to(device), statistics, inputs, labels)
    counts = gradient.new_tensor([samples, unpaired, 0.0])
    sums = {"gradient": gradient.flatten(), "kronecker": moments.packed(), "counts": counts}
    return sums | ({"duality": duality.state} if duality is not None else {})


def _noted(batch: BlockSamples, losses: list[Tensor]) -> Tensor:
    losses.append(batch.whole())
    return losses[-1]


def general_route(problem: NoiseProblem) -> Sums:
    """Sum over this rank's samples by per-sample gradients, and products of the Hessian with all D unit vectors."""
    device, parameter, size = problem.device, problem.parameter, problem.parameter.numel()
    gradient = torch.zeros(size, dtype=torch.float64, device=device)
    products, hessian = gradient.new_zeros(size, size), gradient.new_zeros(size, size)
    space, samples = VectorSpace([parameter]), 0
    vectors = products_at_once(space, problem.trainer.num_devices)
    for batch in _batches(problem):
        rows = torch.cat([graphs.gradients.detach() for graphs in batch.graphs(parameter, problem.batched)])
        rows = rows.to(device, torch.float64)
        gradient += rows.sum(0)
        products.addmm_(rows.mT, rows)
        hessian += batch.size * _block_hessian(batch, problem, space, vectors).to(device, torch.float64)
        samples += batch.size
    counts = gradient.new_tensor([samples, 0.0, 0.0])
    return {"gradient": gradient, "products": products, "hessian": hessian, "counts": counts}


def _block_hessian(batch: BlockSamples, problem: NoiseProblem, space: VectorSpace, vectors: int) -> Tensor:
    """Hessian of the mean loss of the samples by the block, (D, D), from products with that many unit vectors each."""
    parameter, size = problem.parameter, problem.parameter.numel()
    with building_graphs():
        (gradient,) = torch.autograd.grad(batch.mean(problem.batched), parameter, create_graph=True)
    rows = []
    for first in range(0, size, vectors):
        units = torch.zeros(min(vectors, size - first), size, dtype=space.dtype, device=space.device)
        units[:, first:].fill_diagonal_(1.0)
        with building_graphs():
            rows.append(products_with([gradient], [parameter], space, units))
    hessian = torch.cat(rows)
    return 0.5 * (hessian + hessian.mT)


def squared_products(problem: NoiseProblem, vectors: Tensor) -> Tensor:
    r"""Return Σ_p ‖h_p v_i‖² over this rank's samples, the diagonal of Σ_p h_p² in the basis v, (𝒩,) float64."""
    total = torch.zeros(len(vectors), dtype=torch.float64, device=vectors.device)
    space = VectorSpace([problem.parameter])
    for batch in _batches(problem):
        for graphs in batch.graphs(problem.parameter, problem.batched):
            total += _squares(graphs, vectors, products_at_once(space, problem.trainer.num_devices))
    return total


def _squares(graphs: SampleGraphs, vectors: Tensor, at_once: int) -> Tensor:
    step, device = max(1, at_once // len(graphs.gradients)), graphs.gradients.device
    squares = [
        graphs.products(vectors[first : first + step].to(device, graphs.gradients.dtype)).square().sum((1, 2))
        for first in range(0, len(vectors), step)
    ]
    return torch.cat(squares).to(vectors.device, torch.float64)


def moments_of(sums: Sums, shape: tuple[int, ...]) -> NoiseMoments:
    """Return the means of the sums of all ranks; ``shape`` is that of the block."""
    samples, unpaired = sums["counts"][:2].tolist()
    moments: dict[str, Any] = {"second": None, "duality": None}
    if "hessian" in sums:
        moments |= {name: sums[name] / samples for name in ("products", "hessian")}
    else:
        out, into = shape
        matrices = unpacked(sums["kronecker"] / samples, out, into)
        moments |= dict(zip(("products", "hessian", "second"), matrices, strict=True))
        if "duality" in sums:
            moments["duality"] = DualitySums(out, into, "meta")
            moments["duality"].state = sums["duality"]
    return NoiseMoments(round(samples), sums["gradient"] / samples, unpaired=unpaired / samples, **moments)


def _add_pairs(
    duality: DualitySums, weight: Tensor, statistics: LinearStatistics, inputs: Tensor, labels: Tensor
) -> int:
    """Cut a batch into two mini-batches, pair each with the other, and return how many samples have no partner."""
    inputs, labels = inputs.to(weight.device), labels.to(weight.device)
    # Class by class to both halves in turn, so that the classes are balanced.
    order = torch.sort(labels, stable=True).indices
    halves = order[0::2], order[1::2]
    a, missing = statistics.activations, 0
    for half, other in (halves, halves[::-1]):
        partner = matched_pairs(inputs[half], labels[half], inputs[other], labels[other])
        paired = partner >= 0
        missing += int((~paired).sum())
        one, two = half[paired], other[partner[paired]]
        curvatures = statistics.curvatures[one]
        duality.add(duality_terms(weight, a[one], statistics.gradients[one], curvatures, a[two] - a[one]))
    return missing
