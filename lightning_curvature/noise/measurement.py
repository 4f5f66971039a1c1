"""One measurement of the noise against the curvature: sums over samples, the eigenbasis of H, numbers."""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_curvature.distributed.share import each_alone, shared_out
from lightning_curvature.distributed.together import together
from lightning_curvature.functional import noise as formulas
from lightning_curvature.noise.matrices import SHOWN, MatrixWork, Share, matrix_work
from lightning_curvature.noise.options import NoiseOptions
from lightning_curvature.noise.problem import ON_ANOTHER_RANK, NoiseProblem, Route
from lightning_curvature.noise.result import COMPARED, ChainLink, NoiseCurvature
from lightning_curvature.noise.sums import NoiseMoments, Sums, moments_of, no_sums, own_sums, squared_products
from lightning_curvature.operators import NotSeparableError


def measure_noise(options: NoiseOptions, problem: NoiseProblem) -> NoiseCurvature:
    """Measure on all ranks, with two collectives; on the general route another one for "noise_gamma_awd".

    Raises:
        NotSeparableError: on all ranks, if the samples of one of them cannot take the Kronecker route.
        ValueError: if gradients or Hessians are not finite.
    """
    what, empty, why_not = "summing over samples", no_sums(problem), ""

    def make() -> Sums:
        nonlocal why_not
        try:
            return own_sums(problem)
        except NotSeparableError as error:
            why_not = str(error)
        return empty | {"counts": torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64, device=problem.device)}

    sums = together(problem.trainer, make, empty, what)
    if float(sums["counts"][2]):
        raise NotSeparableError(why_not or ON_ANOTHER_RANK)
    moments = moments_of(sums, problem.parameter.shape)

    def squares(vectors: Tensor) -> Tensor:
        zeros = {"squares": vectors.new_zeros(len(vectors))}
        sums = together(problem.trainer, lambda: {"squares": squared_products(problem, vectors)}, zeros, what)
        return sums["squares"] / moments.samples

    share = functools.partial(shared_out, problem.trainer, problem.device, "the work on matrices of the block")
    batch_size, dtype = problem.batch_size, problem.parameter.dtype
    return noise_curvature_of(options, moments, batch_size, dtype, problem.route, squares, problem.why_unpaired, share)


def noise_curvature_of(
    options: NoiseOptions,
    moments: NoiseMoments,
    batch_size: int,
    dtype: torch.dtype,
    route: Route,
    squares: Callable[[Tensor], Tensor] | None = None,
    why_unpaired: str = "",
    share: Share = each_alone,
) -> NoiseCurvature:
    """Return all numbers that follow from C and H of a block of type ``dtype``.

    Where the moments lack E[h²], ``squares`` returns its diagonal in a basis (𝒩, D). ``why_unpaired`` says why no
    samples are paired, where those of a linear layer could be. ``share`` does the work on the matrices.

    Raises:
        ValueError: if gradients or Hessians are not finite.
    """
    hessian, asked = moments.hessian, options.quantities
    if not bool(moments.products.isfinite().all() and hessian.isfinite().all()):
        raise ValueError(
            f"gradients and Hessians by {options.parameter!r} must be finite, got others: the loss overflows, or has a "
            "kink where a derivative is not defined (a square root at 0)."
        )
    # C subtracts two means, in double precision, of gradients whose roundings, those of the run, go in all directions.
    unit, double, size = torch.finfo(dtype).eps, torch.finfo(torch.float64).eps, len(hessian)
    scale = float(moments.products.trace()) / batch_size
    of_trace, of_entry = (scale * (16.0 * double + 4.0 * unit**2 / directions) for directions in (1, size))
    covariance = formulas.covariance_of_sums(moments.products, moments.gradient, 1, batch_size)
    if not float(covariance.trace()) > of_trace:
        covariance.zero_()
    work = matrix_work(options, covariance, hessian, share)
    values, vectors = work.values, work.vectors
    second = None
    if "noise_gamma_awd" in asked:
        if moments.second is not None:
            second = (vectors @ moments.second * vectors).sum(1)
        elif squares is not None:
            second = squares(vectors)
    projected = formulas.in_basis(covariance, vectors)
    # Where there is no noise, there is nothing to fit, and nothing to be coupled.
    silent = projected.diagonal() <= of_entry
    projected[silent] = projected[:, silent] = 0.0
    variances = projected.diagonal()
    # H is rounded as the run is: eigenvalues below that are none, and the directions of rounding say nothing about C.
    floor = unit * float(values.abs().max())
    curved = values.abs() > floor
    within, shown = projected[curved][:, curved], min(SHOWN, len(values))

    numbers: dict[str, Any] = {}
    reasons: dict[str, str] = {}

    def law(key: str, heights: Tensor) -> formulas.PowerLaw | None:
        try:
            return formulas.power_law(values, heights, floor)
        except ValueError as error:
            reasons[key] = str(error)
        return None

    if "noise_gamma" in asked:
        numbers["gamma"] = law("noise_gamma", variances)
    if second is not None:
        numbers |= {"gamma_awd": law("noise_gamma_awd", second), "second_moments": second.cpu()}
    if work.commutator is not None:
        (difference, product), size_of_both = work.commutator.tolist(), float(covariance.norm()) * float(hessian.norm())
        numbers["commutativity"] = difference / size_of_both if size_of_both else math.nan
        numbers["relative_commutativity"] = difference / product if product else math.nan
        numbers["random_commutativity"] = formulas.random_commutativity_error(covariance, hessian, relative=True)
    if "noise_alignment" in asked:
        numbers["alignment"] = formulas.eigen_alignment(within)
    if "noise_spearman" in asked:
        numbers["spearman"] = formulas.spearman_correlation(values[curved], within.diagonal())
    if "noise_coupling" in asked:
        numbers |= _coupling(covariance, within, work)
    why = _why_incomparable(covariance, hessian, values)
    reasons |= {key: why for key, name in COMPARED.items() if math.isnan(numbers.get(name, 0.0))}
    if "noise_coupling" in reasons and bool(covariance.any()) and len(within):
        reasons["noise_coupling"] = "there must be two directions with noise in them."
    if "noise_awd_chain" in asked:
        if moments.duality is None:
            linear = "it exists for the weight of a linear layer that is used once for each sample."
            reasons["noise_awd_chain"] = why_unpaired or linear
        elif not moments.duality.batches:
            reasons["noise_awd_chain"] = (
                "no sample has a partner of its class in the other half of its batch: give larger micro-batches, or "
                "fewer classes."
            )
        else:
            numbers["weight_variance"] = moments.duality.weight_variance
            matrices = moments.duality.matrices(moments.second)
            numbers["chain"] = _chain(matrices, covariance, batch_size, vectors, law)
            # Others have no key, and "hg" is indefinite.
            for name in matrices.keys() - set(formulas.CHAIN):
                reasons.pop(f"noise_gamma_awd_{name}", None)
    return NoiseCurvature(
        parameter=options.parameter,
        quantities=tuple(asked),
        route=route,
        samples=moments.samples,
        batch_size=batch_size,
        dimension=size,
        curved=int(curved.sum()),
        curvatures=values.cpu(),
        variances=variances.cpu(),
        vectors=vectors.cpu(),
        shown=projected[:shown, :shown].cpu(),
        degenerate=_degenerate(values[curved], unit),
        unpaired=moments.unpaired,
        reasons=reasons,
        **numbers,
    )


def _degenerate(values: Tensor, unit: float) -> float:
    """Share of the eigenvalues, descending, that are equal to the one before, but for rounding."""
    if len(values) < 2:
        return 0.0
    # The rounding of H is relative to its largest eigenvalue, and cancels in the mean over samples to some extent.
    equal = values[:-1] - values[1:] <= 10.0 * unit * (values[:-1].abs() + unit * values[0].abs())
    return float(equal.double().mean())


def _why_incomparable(covariance: Tensor, hessian: Tensor, curvatures: Tensor) -> str:
    """Why a comparison of C with H is NaN, if it is."""
    if not covariance.any():
        return "the gradients of all samples are alike: there is no noise, but for rounding."
    if not hessian.any():
        return (
            "the Hessian is zero: the loss is linear in the parameter, or piecewise so, or constant for a sample "
            "alone, as one that compares samples is."
        )
    if float(curvatures[0] - curvatures[-1]) <= 1e-5 * float(curvatures[0].abs()):
        return "all eigenvalues of the Hessian are the same, so that its eigenvectors are any directions."
    return "noise and curvature are in different directions."


def _coupling(covariance: Tensor, within: Tensor, work: MatrixWork) -> dict[str, Any]:
    """Coupling of the directions, beside that of rotated noise."""
    coupling = formulas.mean_coupling(formulas.coupling_matrix(within))
    spikes = formulas.effective_spikes(covariance)
    numbers: dict[str, Any] = {"coupling": coupling, "spikes": spikes}
    if not math.isnan(coupling) and work.couplings is not None and work.shown_random is not None:
        numbers["test"] = formulas.coupling_test(coupling, spikes, len(within))
        numbers["haar"] = work.couplings[:, len(within) - 1].cpu()
        numbers["shown_random"] = work.shown_random.cpu()
    return numbers


def _chain(
    matrices: dict[str, Tensor],
    covariance: Tensor,
    batch_size: int,
    vectors: Tensor,
    law: Callable[[str, Tensor], formulas.PowerLaw | None],
) -> dict[str, ChainLink]:
    """Approximations of C, from those of the covariance of single samples."""
    chain, norm = {}, float(covariance.norm())
    for name, matrix in matrices.items():
        scaled = matrix / batch_size
        diagonal = (vectors @ scaled * vectors).sum(1)
        distance = float((scaled - covariance).norm()) / norm if norm else math.nan
        gamma = law(f"noise_gamma_awd_{name}", diagonal)
        chain[name] = ChainLink(gamma, float(scaled.norm()), distance, diagonal.cpu())
    return chain
