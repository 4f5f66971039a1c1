"""The covariance of the gradient noise of SGD against the Hessian of the loss: pure functions.

Sources are cited by name: see docs/references.md.
"""

from lightning_curvature.functional.noise.coupling import (
    CouplingTest,
    coupling_matrix,
    coupling_test,
    effective_spikes,
    haar_coupling,
    haar_rotated,
    leading_couplings,
    mean_coupling,
    random_coupling,
)
from lightning_curvature.functional.noise.covariance import (
    CurvatureBasis,
    covariance_of_sums,
    curvature_basis,
    default_top,
    in_basis,
    noise_covariance,
)
from lightning_curvature.functional.noise.duality import CHAIN, DualitySums, DualityTerms, duality_terms, matched_pairs
from lightning_curvature.functional.noise.kronecker import KroneckerSum, kronecker_sums, linear_blocks, unpacked
from lightning_curvature.functional.noise.relation import (
    PowerLaw,
    commutativity_error,
    commutator_norms,
    eigen_alignment,
    power_law,
    random_commutativity_error,
    relative_commutativity_error,
    spearman_correlation,
)
from lightning_curvature.functional.noise.spectra import (
    SampleSpectra,
    Suppressed,
    cumulative_contribution,
    linear_sample_spectra,
    spectral_moments,
    suppressed,
)

__all__ = [
    "CHAIN",
    "CouplingTest",
    "CurvatureBasis",
    "DualitySums",
    "DualityTerms",
    "KroneckerSum",
    "PowerLaw",
    "SampleSpectra",
    "Suppressed",
    "commutativity_error",
    "commutator_norms",
    "coupling_matrix",
    "coupling_test",
    "covariance_of_sums",
    "cumulative_contribution",
    "curvature_basis",
    "default_top",
    "duality_terms",
    "effective_spikes",
    "eigen_alignment",
    "haar_coupling",
    "haar_rotated",
    "in_basis",
    "kronecker_sums",
    "leading_couplings",
    "linear_blocks",
    "linear_sample_spectra",
    "matched_pairs",
    "mean_coupling",
    "noise_covariance",
    "power_law",
    "random_commutativity_error",
    "random_coupling",
    "relative_commutativity_error",
    "spearman_correlation",
    "spectral_moments",
    "suppressed",
    "unpacked",
]
