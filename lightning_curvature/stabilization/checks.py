"""Checks of what is asked of sample growth: one sentence each, with argument, rule, value and remedy."""

import math
from collections.abc import Iterable, Sequence
from numbers import Real

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_curvature.monitors.checks import check_count, check_fraction, check_names, check_numbers
from lightning_curvature.stabilization.options import (
    ESTIMATORS,
    LAWS,
    QUANTITIES,
    Estimator,
    GrowthOptions,
    Law,
    Quantity,
)


def growth_options(
    *,
    quantities: Sequence[Quantity],
    sample_sizes: Sequence[int],
    candidates: int,
    subspace_dim: int | Sequence[int],
    sigma: float | Sequence[float],
    estimators: Sequence[Estimator],
    draws: int,
    trace_vectors: int,
    validation_draws: int,
    order: float,
    law: Law,
    tolerance: float,
    max_products: int | None,
    model_tolerance: float,
) -> GrowthOptions:
    """Check what is asked for, and bring it into one form; arguments are those of the monitor.

    Raises:
        ValueError: for an argument outside its rule.
    """
    check_names("quantities", quantities, QUANTITIES)
    check_names("estimators", estimators, ESTIMATORS)
    check_names("law", [law], LAWS)
    sizes = check_numbers("sample_sizes", sample_sizes, "(8, 64) measures at both")
    dims = check_numbers("subspace_dim", subspace_dim, "16 holds what matters of many networks")
    for name, value, least, remedy in (
        ("candidates", candidates, 1, "8 tell how much samples differ"),
        ("draws", draws, 2, "64 make a standard error that can be trusted"),
        ("trace_vectors", trace_vectors, 3, "16 give the traces to a few per cent"),
        ("validation_draws", validation_draws, 0, "0 leaves the model unchecked"),
    ):
        check_count(name, value, least, remedy)
    check_count("max_products", max_products, dims[-1] + 1, "None allows 20 for each direction", optional=True)
    check_fraction("tolerance", tolerance, "1e-3 gives eigenvectors to three digits")
    check_fraction("model_tolerance", model_tolerance, "0.1 takes a model that is right to 10 %")
    sigmas = tuple(sigma) if isinstance(sigma, Iterable) and not isinstance(sigma, str) else (sigma,)
    if not sigmas or not all(isinstance(s, Real) and not isinstance(s, bool) and 0.0 < s < math.inf for s in sigmas):
        raise ValueError(
            f"sigma must be positive, got {sigma!r}: 1e-3 is a usual width in units of the parameters, a number and no "
            "text."
        )
    if not isinstance(order, (int, float)) or not 0.0 < order < math.inf:
        raise ValueError(f"order must be positive, got {order!r}: 2 is the mean square.")
    if order != 2.0 and "gaussian_moment" in estimators:
        raise ValueError(
            f"estimators must not hold 'gaussian_moment' where order is not 2, got {order!r}, for which there is "
            "no closed form: use 'quadratic' or 'direct'."
        )
    if law == "gradients" and sizes[0] < dims[-1]:
        raise ValueError(
            f"sample_sizes must not be below subspace_dim where law is 'gradients', got {sizes[0]} for {dims[-1]} "
            "directions, each the gradient of a sample: raise sample_sizes or lower subspace_dim."
        )
    return GrowthOptions(
        quantities=tuple(dict.fromkeys(quantities)),
        sample_sizes=sizes,
        candidates=candidates,
        subspace_dims=dims[::-1],
        sigmas=tuple(dict.fromkeys(map(float, sigmas))),
        estimators=tuple(dict.fromkeys(estimators)),
        draws=draws,
        trace_vectors=trace_vectors,
        validation_draws=validation_draws,
        order=float(order),
        law=law,
        tolerance=tolerance,
        max_products=max_products or 20 * dims[-1] + 20,
        model_tolerance=model_tolerance,
    )


def check_directions(vectors: object, shape: tuple[int, int]) -> Tensor:
    """Return the vectors that the user's callable gave.

    Raises:
        MisconfigurationException: unless they are finite, (D, N).
    """
    if not isinstance(vectors, Tensor) or vectors.shape != shape or not bool(vectors.isfinite().all()):
        got = f"shape {tuple(vectors.shape)}" if isinstance(vectors, Tensor) else f"a {type(vectors).__name__}"
        got = "others" if got == f"shape {shape}" else got
        raise MisconfigurationException(
            f"directions must return finite numbers, (subspace_dim, parameters) = {shape}, got {got}: return one row "
            "for each direction, all parameters in it."
        )
    return vectors.detach()
