"""Names of the quantities of all families, as users may look for them: by key, or at another monitor."""

from collections.abc import Iterable, Mapping
from typing import Literal, get_args

from lightning_curvature.arguments import Rule, spelled

DirectionalEstimator = Literal["kl", "finite_difference", "hvp", "gauss_newton", "critical", "oscillation"]
SpectrumQuantity = Literal[
    "lambda_max",
    "lambda_min",
    "hessian_trace",
    "spectral_density",
    "gauss_newton_lambda_max",
    "preconditioned_lambda_max",
    "second_moment_contraction",
]
SharpnessQuantity = Literal[
    "batch_sharpness",
    "step_sharpness",
    "modified_batch_sharpness",
    "update_sharpness",
    "ias",
    "gni",
    "lambda_gen",
    "lambda_max_b",
]
StabilizationQuantity = Literal["delta_1", "delta_2", "delta_2_subspace"]
NoiseQuantity = Literal[
    "noise_gamma",
    "noise_gamma_awd",
    "noise_commutativity",
    "noise_alignment",
    "noise_spearman",
    "noise_coupling",
    "noise_awd_chain",
]
# Keys of estimators, which are not their names.
ESTIMATOR_KEYS = {
    "hvp": "lambda_dir",
    "finite_difference": "lambda_fd",
    "kl": "lambda_kl",
    "gauss_newton": "lambda_gn",
    "critical": "critical_sharpness",
    "oscillation": "lambda_osc",
}
# Names of quantities and estimators by the monitor and the option that take them.
HOMES: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("DirectionalCurvatureMonitor", "estimators"): get_args(DirectionalEstimator),
    ("HessianSpectrumMonitor", "quantities"): get_args(SpectrumQuantity),
    ("BatchSharpnessMonitor", "quantities"): get_args(SharpnessQuantity),
    ("StabilizationMonitor", "quantities"): get_args(StabilizationQuantity),
    ("NoiseCovarianceMonitor", "quantities"): get_args(NoiseQuantity),
}


def names(own: Mapping[str, Iterable[str]]) -> Rule:
    """Return the rule of names of quantities, by which their keys and names of other monitors are recognized.

    Args:
        own: keys by name, of the monitor itself.
    """
    written = {name: f"{monitor}({option}=({name!r},))" for (monitor, option), known in HOMES.items() for name in known}
    elsewhere = written | {key: written[name] for name, key in ESTIMATOR_KEYS.items()}
    return spelled(**elsewhere | {key: repr(name) for name, keys in own.items() for key in keys})
