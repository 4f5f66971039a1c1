"""Algorithms that see a matvec and a vector space, never a model."""

from lightning_curvature.linalg.eigenpairs import Eigenpairs, eigenpairs
from lightning_curvature.linalg.krylov import KrylovSpace, MatVec, NonFiniteProductError
from lightning_curvature.linalg.space import VectorSpace

__all__ = ["Eigenpairs", "KrylovSpace", "MatVec", "NonFiniteProductError", "VectorSpace", "eigenpairs"]
