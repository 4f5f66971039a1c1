"""Eigenpairs, trace and spectral density: algorithms on a matvec and a vector space, never on a model."""

from lightning_curvature.linalg.density import SpectralDensity, spectral_density
from lightning_curvature.linalg.eigenpairs import Eigenpairs, eigenpairs
from lightning_curvature.linalg.krylov import KrylovSpace, MatVec, NonFiniteProductError
from lightning_curvature.linalg.space import VectorSpace
from lightning_curvature.linalg.trace import TraceEstimate, trace
from lightning_curvature.linalg.tracking import EigenTracker

__all__ = [
    "EigenTracker",
    "Eigenpairs",
    "KrylovSpace",
    "MatVec",
    "NonFiniteProductError",
    "SpectralDensity",
    "TraceEstimate",
    "VectorSpace",
    "eigenpairs",
    "spectral_density",
    "trace",
]
