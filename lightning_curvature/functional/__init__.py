"""Formulas: tensors in, tensors out, without modules, optimizers or trainers."""

from lightning_curvature.functional.directional import (
    critical_sharpness,
    directional_curvature,
    finite_difference_curvature,
    finite_difference_descent,
    finite_difference_quadratic,
    gauss_newton_curvature,
    headroom,
    kl_curvature,
)
from lightning_curvature.functional.likelihoods import (
    LIKELIHOODS,
    DivergenceStatistics,
    Likelihood,
    divergence_statistics,
    kl_divergence,
    output_noise_gain,
    output_quadratic_form,
)
from lightning_curvature.functional.line_fit import DecaySlope, decay_slope
from lightning_curvature.functional.mean_square import mean_square_index
from lightning_curvature.functional.model_error import relative_model_error, validated_sigma
from lightning_curvature.functional.oscillation import (
    oscillation,
    oscillation_cosine,
    oscillation_curvature,
    oscillation_secant,
)
from lightning_curvature.functional.pairs import PairStatistics, pair_statistics
from lightning_curvature.functional.products import hessian_quadratic_form
from lightning_curvature.functional.regime import REGIMES, EdgeRatio, catapult_alarm, edge_ratio, regime
from lightning_curvature.functional.sharpness import (
    NoiseTerms,
    add_to_moments,
    batch_factor,
    merge_moments,
    ratio_of_means,
    ratio_standard_error,
)
from lightning_curvature.functional.stabilization import (
    QuadraticIncrement,
    gaussian_moment,
    increment,
    rate_bound,
    sampled_gaussian_moment,
)
from lightning_curvature.functional.step_length import ErrorModel, choose_epsilon
from lightning_curvature.functional.thresholds import adaptive_threshold, momentum_threshold, sharpness_plateaus

__all__ = [
    "LIKELIHOODS",
    "REGIMES",
    "DecaySlope",
    "DivergenceStatistics",
    "EdgeRatio",
    "ErrorModel",
    "Likelihood",
    "NoiseTerms",
    "PairStatistics",
    "QuadraticIncrement",
    "adaptive_threshold",
    "add_to_moments",
    "batch_factor",
    "catapult_alarm",
    "choose_epsilon",
    "critical_sharpness",
    "decay_slope",
    "directional_curvature",
    "divergence_statistics",
    "edge_ratio",
    "finite_difference_curvature",
    "finite_difference_descent",
    "finite_difference_quadratic",
    "gauss_newton_curvature",
    "gaussian_moment",
    "headroom",
    "hessian_quadratic_form",
    "increment",
    "kl_curvature",
    "kl_divergence",
    "mean_square_index",
    "merge_moments",
    "momentum_threshold",
    "oscillation",
    "oscillation_cosine",
    "oscillation_curvature",
    "oscillation_secant",
    "output_noise_gain",
    "output_quadratic_form",
    "pair_statistics",
    "rate_bound",
    "ratio_of_means",
    "ratio_standard_error",
    "regime",
    "relative_model_error",
    "sampled_gaussian_moment",
    "sharpness_plateaus",
    "validated_sigma",
]
