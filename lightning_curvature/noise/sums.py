"""Sums over samples that make up the noise covariance and the Hessian of a block; sums of several ranks add up."""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_curvature.functional import noise as formulas
from lightning_curvature.functional.products import differentiable_gradients
from lightning_curvature.linalg import VectorSpace
from lightning_curvature.losses.samples import BlockSamples, SampleGraphs
from lightning_curvature.noise.problem import NoiseProblem
from lightning_curvature.operators import NotSeparableError, linear_statistics
from lightning_curvature.operators.graphs import products_at_once, products_with
from lightning_curvature.operators.micro_batches import building_graphs

Sums = dict[str, Tensor]
NOT_A_MEAN = "the loss of a batch is not the mean of those of its samples"


class NoiseMoments(NamedTuple):
    """Means over the n samples of all ranks.

    Attributes:
        samples: n.
        unpaired: share of the samples that have no partner of their class.
        gradient: ḡ, (D,).
        products, hessian: E[g gᵀ] and H = E[h], (D, D).
        second: E[h²], (D, D), on the Kronecker route.
        duality: sums over pairs of mini-batches, where they were asked for.
    """

    samples: int
    unpaired: float
    gradient: Tensor
    products: Tensor
    hessian: Tensor
    second: Tensor | None = None
    duality: formulas.DualitySums | None = None


def sum_device(parameter: Tensor) -> torch.device:
    """Return the device of the sums: that of the block if it computes in double precision, else the CPU."""
    return torch.device("cpu") if parameter.device.type == "mps" else parameter.device


def own_sums(problem: NoiseProblem) -> Sums:
    """Return the sums over this rank's samples; ``counts`` are samples, those with a partner, and 0.

    Raises:
        NotSeparableError: on the Kronecker route, if a batch cannot take it.
    """
    return general_route(problem) if problem.layer is None else kronecker_route(problem)


def no_sums(problem: NoiseProblem) -> Sums:
    """Return zeros of the shapes of :func:`own_sums`, which take no memory."""
    size = problem.parameter.numel()
    shapes: dict[str, tuple[int, ...]] = {"gradient": (size,), "counts": (3,)}
    if problem.layer is None:
        shapes |= {"products": (size, size), "hessian": (size, size)}
    else:
        out, into = problem.layer.weight.shape
        shapes["kronecker"] = formulas.KroneckerSum(3, out, into, "meta").packed().shape
        if problem.pairing is not None:
            shapes["duality"] = formulas.DualitySums(out, into, "meta").state.shape
    zero = torch.zeros((), dtype=torch.float64, device=problem.device)
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
    moments = formulas.KroneckerSum(3, out, into, device)
    duality = formulas.DualitySums(out, into, device) if problem.pairing is not None else None
    weight, processes, samples, paired = layer.weight.detach().to(device), problem.trainer.num_devices, 0, 0
    for batch in _batches(problem):
        losses: list[Tensor] = []
        found = linear_statistics(layer, functools.partial(_noted, batch, losses), batch.size, processes)
        # In every batch: class weights, for example, show only in those of several classes.
        if not batch.is_mean(problem.batched, losses.pop()):
            raise NotSeparableError(NOT_A_MEAN)
        a, delta, s = (t.to(gradient) for t in (found.activations, found.gradients, found.curvatures))
        gradient += delta.mT @ a
        moments.add(formulas.linear_blocks(a, delta, s), a)
        samples += batch.size
        if duality is not None and problem.pairing is not None:
            inputs, labels = (t.to(device) for t in problem.pairing(batch.batch))
            for one, other in _pairs(inputs, labels):
                duality.add(formulas.duality_terms(weight, a[one], delta[one], s[one], a[other] - a[one]))
                paired += len(one)
    counts = gradient.new_tensor([samples, paired, 0.0])
    sums = {"gradient": gradient.flatten(), "kronecker": moments.packed(), "counts": counts}
    return sums if duality is None else sums | {"duality": duality.state}


def _noted(batch: BlockSamples, losses: list[Tensor]) -> Tensor:
    losses.append(batch.whole())
    return losses[-1]


def general_route(problem: NoiseProblem) -> Sums:
    """Sum over this rank's samples by per-sample gradients, and products of the Hessian with all D unit vectors."""
    sums = {name: zeros.clone() for name, zeros in no_sums(problem).items()}
    parameter, space = problem.parameter, VectorSpace([problem.parameter])
    vectors = products_at_once(space, problem.trainer.num_devices)
    for batch in _batches(problem):
        rows = torch.cat([graphs.gradients.detach() for graphs in batch.graphs(parameter, problem.batched)])
        rows = rows.to(sums["products"])
        sums["gradient"] += rows.sum(0)
        sums["products"].addmm_(rows.mT, rows)
        sums["hessian"] += batch.size * _block_hessian(batch, problem, space, vectors).to(rows)
        sums["counts"][0] += batch.size
    return sums


def _block_hessian(batch: BlockSamples, problem: NoiseProblem, space: VectorSpace, vectors: int) -> Tensor:
    """Hessian of the mean loss of the samples by the block, (D, D), from products with that many unit vectors each."""
    parameter, size = problem.parameter, problem.parameter.numel()
    with building_graphs():
        (gradient,) = differentiable_gradients(batch.mean(problem.batched), [parameter])
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
    samples, paired = sums["counts"][:2].tolist()
    common = round(samples), 1.0 - paired / samples if "duality" in sums else 0.0, sums["gradient"] / samples
    if "hessian" in sums:
        return NoiseMoments(*common, sums["products"] / samples, sums["hessian"] / samples)
    (out, into), duality = shape, None
    if "duality" in sums:
        duality = formulas.DualitySums(out, into, "meta")
        duality.state = sums["duality"]
    products, hessian, second = formulas.unpacked(sums["kronecker"] / samples, out, into)
    return NoiseMoments(*common, products, hessian, second, duality)


def _pairs(inputs: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut a batch into two mini-batches and yield, for each, its samples with a partner, and these in the other one."""
    # Class by class to both in turn, so that the classes are balanced.
    order = torch.sort(labels, stable=True).indices
    halves = order[0::2], order[1::2]
    for half, other in (halves, halves[::-1]):
        partner = formulas.matched_pairs(inputs[half], labels[half], inputs[other], labels[other])
        yield half[partner >= 0], other[partner[partner >= 0]]
