"""One measurement of the noise against the curvature: sums over samples, the eigenbasis, numbers."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_curvature.distributed.failures import agree, noted
from lightning_curvature.distributed.reduce import sum_of_tensors
from lightning_curvature.functional.noise import (
    CHAIN,
    commutativity_error,
    coupling_matrix,
    coupling_test,
    covariance_of_sums,
    curvature_basis,
    effective_spikes,
    eigen_alignment,
    haar_coupling,
    haar_rotated,
    in_basis,
    mean_coupling,
    power_law,
    random_commutativity_error,
    relative_commutativity_error,
    spearman_correlation,
)
from lightning_curvature.noise.linear_layer import SeveralUsesError
from lightning_curvature.noise.problem import Block, NoiseOptions, NoiseProblem
from lightning_curvature.noise.result import ChainLink, NoiseCurvature
from lightning_curvature.noise.sums import (
    NoiseMoments,
    Sums,
    general_route,
    kronecker_route,
    moments_of,
    squared_products,
)

# Directions of the matrices that are kept for pictures, as many as P2 shows.
_SHOWN = 100
_COMPARED = (
    "noise_commutativity",
    "noise_commutativity_relative",
    "noise_alignment",
    "noise_spearman",
    "noise_coupling",
)


def measure_noise(options: NoiseOptions, problem: NoiseProblem) -> NoiseCurvature:
    """Measure on all ranks; each comes here, and two collectives bring their sums together (general route: four).

    Raises:
        SeveralUsesError: on all ranks, if the samples of one of them cannot take the Kronecker route.
        ValueError: if gradients or Hessians are not finite.
        Exception: whatever a training step raises on this rank.
        RuntimeError: on the other ranks, when one has failed.
    """

    def own_sums() -> Sums:
        return general_route(problem) if problem.layer is None else kronecker_route(problem)

    moments = moments_of(_together(problem, own_sums), problem)

    def squares(vectors: Tensor) -> Tensor:
        sums = _together(problem, lambda: {"squares": squared_products(problem, vectors)})
        return sums["squares"] / moments.samples

    result = relation(options, problem, moments, squares)
    if problem.unpaired and problem.layer is not None:
        result.reasons["noise_awd_chain"] = problem.unpaired
    return result


def _together(problem: NoiseProblem, own_sums: Callable[[], Sums]) -> Sums:
    """Sum over all ranks what each of them makes; one that fails tells the others before."""
    errors: list[Exception] = []
    found: list[Sums] = []
    unfit: list[Exception] = []
    with noted(errors):
        try:
            found.append(own_sums())
        except SeveralUsesError as error:
            unfit.append(error.with_traceback(None))  # which holds graphs
    if agree(problem.trainer, errors, "summing over samples", 0.0 if unfit else 1.0) < 1.0:
        raise unfit.pop() if unfit else SeveralUsesError("on another rank it cannot take the Kronecker route")
    return sum_of_tensors(problem.trainer, found[0])


def _rounding(block: Block, moments: NoiseMoments, directions: int) -> float:
    """What rounding may leave of C in one of so many directions, where there is no noise.

    C is a difference of two means, summed in double precision, of gradients in the precision of the run, whose own
    roundings go in all directions.
    """
    own, double = (torch.finfo(dtype).eps for dtype in (block.parameter.dtype, torch.float64))
    scale = float(moments.products.trace()) / block.batch_size
    return (16.0 * double + 4.0 * own**2 / directions) * scale


def relation(
    options: NoiseOptions, block: Block, moments: NoiseMoments, squares: Callable[[Tensor], Tensor] | None = None
) -> NoiseCurvature:
    """Return everything that follows from C and H.

    Args:
        options: what is asked for.
        block: the parameters.
        moments: means over all samples.
        squares: gives the diagonal of E[h²] in a basis (𝒩, D), where its matrix is not among the moments.

    Raises:
        ValueError: if gradients or Hessians are not finite.
    """
    if not bool(moments.products.isfinite().all() and moments.hessian.isfinite().all()):
        raise ValueError(
            f"gradients and Hessians by {block.name!r} must be finite, got others: the loss overflows, or has a kink "
            "where a derivative is not defined (a square root at 0)."
        )
    covariance = covariance_of_sums(moments.products, moments.gradient, 1, block.batch_size)
    if not float(covariance.trace()) > _rounding(block, moments, 1):
        covariance.zero_()
    values, vectors = curvature_basis(moments.hessian, options.top)
    second = None
    if "noise_gamma_awd" in options.quantities:
        if moments.second is not None:
            second = (vectors @ moments.second * vectors).sum(1)
        elif squares is not None:
            second = squares(vectors)
    projected = in_basis(covariance, vectors)
    # Where there is no noise, there is none to be coupled, or fitted.
    silent = projected.diagonal() <= _rounding(block, moments, len(covariance))
    projected[silent] = projected[:, silent] = 0.0
    # H is a mean of numbers in the precision of the run: eigenvalues below their rounding are nothing, and directions
    # that rounding alone tells apart say nothing of C.
    unit = torch.finfo(block.parameter.dtype).eps
    floor = unit * float(values.abs().max())
    curved = values.abs() > floor
    within = projected[curved][:, curved]
    shown = min(_SHOWN, len(values))
    result = NoiseCurvature(
        parameter=block.name,
        route="general" if block.layer is None else "kronecker",
        samples=moments.samples,
        batch_size=block.batch_size,
        dimension=len(covariance),
        curved=int(curved.sum()),
        curvatures=values.cpu(),
        variances=projected.diagonal().cpu(),
        second_moments=None if second is None else second.cpu(),
        vectors=vectors.cpu(),
        shown=projected[:shown, :shown].cpu(),
        unpaired=moments.unpaired,
    )
    asked = options.quantities
    if "noise_gamma" in asked:
        result.gamma = result.attempt("noise_gamma", lambda: power_law(values, projected.diagonal(), floor))
    if second is not None:
        result.gamma_awd = result.attempt("noise_gamma_awd", lambda: power_law(values, second, floor))
    if "noise_commutativity" in asked:
        result.commutativity = commutativity_error(covariance, moments.hessian)
        result.relative_commutativity = relative_commutativity_error(covariance, moments.hessian)
        result.random_commutativity = random_commutativity_error(covariance, moments.hessian, relative=True)
    if "noise_alignment" in asked:
        result.alignment = eigen_alignment(within)
    if "noise_spearman" in asked:
        result.spearman = spearman_correlation(values[curved], within.diagonal())
    if "noise_coupling" in asked:
        _couple(result, options, block.seed, covariance, within)
    result.degenerate = _degenerate(values[curved], unit)
    _explain(result, options, no_noise=not covariance.any(), no_curvature=not moments.hessian.any())
    if "noise_awd_chain" in asked:
        _add_chain(result, moments, covariance, vectors, floor)
    return result


def _degenerate(values: Tensor, unit: float) -> float:
    """Share of the eigenvalues, descending, that are equal to the one before, but for rounding."""
    if len(values) < 2:
        return 0.0
    # The rounding of H is relative to its largest eigenvalue, and cancels in the mean over samples to some extent.
    alike = values[:-1] - values[1:] <= 10.0 * unit * (values[:-1].abs() + unit * values[0].abs())
    return float(alike.double().mean())


def _explain(result: NoiseCurvature, options: NoiseOptions, no_noise: bool, no_curvature: bool) -> None:
    """Reasons for what is NaN of the comparison of C with H."""
    if no_noise:
        reason = "the gradients of all samples are alike: there is no noise, but for rounding"
    elif no_curvature:
        reason = (
            "the Hessian is zero: the loss is linear in the parameter, or piecewise so, or constant for a sample "
            "alone, as one that compares samples is"
        )
    elif float(result.curvatures[0] - result.curvatures[-1]) <= 1e-5 * float(result.curvatures[0].abs()):
        reason = "all eigenvalues of the Hessian are the same, so that its eigenvectors are any directions"
    else:
        reason = "noise and curvature are in different directions"
    for key, value in result.values(options.quantities).items():
        if key in _COMPARED and math.isnan(value) and (no_noise or key not in result.reasons):
            result.reasons[key] = f"{reason}."


def _couple(result: NoiseCurvature, options: NoiseOptions, seed: int, covariance: Tensor, projected: Tensor) -> None:
    """Coupling of the directions, beside that of rotated noise."""
    result.coupling = mean_coupling(coupling_matrix(projected))
    result.spikes = effective_spikes(covariance)
    if math.isnan(result.coupling) or math.isnan(result.spikes):
        if len(projected):
            result.reasons["noise_coupling"] = "there must be two directions with noise in them."
        return
    result.test = coupling_test(result.coupling, result.spikes, len(projected))
    generator = torch.Generator(covariance.device).manual_seed(seed)
    result.haar = haar_coupling(covariance, len(projected), options.haar_draws, generator)
    result.shown_random = haar_rotated(covariance, len(result.shown), generator).cpu()


def _add_chain(
    result: NoiseCurvature, moments: NoiseMoments, covariance: Tensor, vectors: Tensor, floor: float
) -> None:
    """P2's approximations of C, one after the other."""
    duality = moments.duality
    if duality is None:
        result.reasons["noise_awd_chain"] = (
            "it exists for the weight of a linear layer that is used once for each sample."
        )
        return
    if not duality.batches:
        result.reasons["noise_awd_chain"] = (
            "no sample has a partner of its class in the other half of its batch: give larger micro-batches, or fewer "
            "classes."
        )
        return
    result.weight_variance = duality.weight_variance
    values = result.curvatures.to(vectors.device)
    norm = float(covariance.norm())
    for name, matrix in duality.matrices(moments.second).items():
        scaled = matrix / result.batch_size
        diagonal = (vectors @ scaled * vectors).sum(1)
        key = f"noise_gamma_awd_{name}"
        law = result.attempt(key, lambda d=diagonal: power_law(values, d, floor))  # type: ignore[misc]
        if name not in CHAIN:
            result.reasons.pop(key, None)  # no value of its own, and "hg" is indefinite
        distance = float((scaled - covariance).norm()) / norm if norm else math.nan
        result.chain[name] = ChainLink(law, float(scaled.norm()), distance, diagonal.cpu())
