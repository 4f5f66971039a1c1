"""The work on D × D matrices that follows from C and H: eigenvectors, random rotations, the commutator."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_curvature.data.copies import mixed
from lightning_curvature.distributed.share import Piece
from lightning_curvature.functional import noise as formulas
from lightning_curvature.noise.options import NoiseOptions

Share = Callable[[Mapping[str, Piece]], dict[str, Tensor]]

# Directions of the matrices that are kept for pictures, as many as the source shows.
SHOWN = 100
# Costs of the eigenvectors and of the commutator, in rotations: 0.22, 0.05 and 0.05 s on one core at D = 1,024; rotated
# parts to be shown take little.
_EIGENVECTORS, _COMMUTATOR, _PART = 4.5, 1.0, 0.2


@dataclass(frozen=True)
class MatrixWork:
    """What takes D³ operations.

    Attributes:
        values, vectors: the leading eigenpairs of H, (𝒩,) and (𝒩, D).
        couplings: μ of C after each random rotation, in the first 1, 2, …, 𝒩 directions, (draws, 𝒩); None without it.
        shown_random: part of C with random eigenvectors; None without it.
        commutator: ‖CH − HC‖_F and ‖CH‖_F, (2,); None without it.
    """

    values: Tensor
    vectors: Tensor
    couplings: Tensor | None
    shown_random: Tensor | None
    commutator: Tensor | None


def matrix_work(options: NoiseOptions, covariance: Tensor, hessian: Tensor, share: Share) -> MatrixWork:
    """Do it; ``share`` returns the results of pieces by name."""
    size = len(hessian)
    top = options.top or formulas.default_top(size)
    shown = min(SHOWN, top)
    pieces = {"eigenvectors": Piece(lambda: _eigenpairs(hessian, options.top), (top, 1 + size), _EIGENVECTORS)}
    if "noise_commutativity" in options.quantities:
        pieces["commutator"] = Piece(lambda: formulas.commutator_norms(covariance, hessian), (2,), _COMMUTATOR)
    rotations = []
    if "noise_coupling" in options.quantities and bool(covariance.any()):
        for draw in range(options.haar_draws):
            rotations.append(f"rotation {draw}")
            pieces[rotations[-1]] = Piece(functools.partial(_couplings, options, covariance, top, draw), (top,))
        part = functools.partial(_rotated, options, covariance, shown, options.haar_draws)
        pieces["shown"] = Piece(part, (shown, shown), _PART)
    found = share(pieces)
    pairs, couplings = found["eigenvectors"], [found[name] for name in rotations]
    return MatrixWork(
        values=pairs[:, 0].contiguous(),
        vectors=pairs[:, 1:].contiguous(),
        couplings=torch.stack(couplings) if couplings else None,
        shown_random=found.get("shown"),
        commutator=found.get("commutator"),
    )


def _eigenpairs(hessian: Tensor, top: int | None) -> Tensor:
    """Return eigenvalues and vectors, a row each, (𝒩, 1 + D)."""
    basis = formulas.curvature_basis(hessian, top)
    return torch.cat([basis.values[:, None], basis.vectors], dim=1)


def _rotated(options: NoiseOptions, covariance: Tensor, directions: int, draw: int) -> Tensor:
    """Return C after the random rotation of that number, the same on every rank."""
    generator = torch.Generator(covariance.device).manual_seed(mixed(options.seed, draw))
    return formulas.haar_rotated(covariance, directions, generator)


def _couplings(options: NoiseOptions, covariance: Tensor, directions: int, draw: int) -> Tensor:
    """Return μ of a random rotation in its first 1, 2, …, 𝒩 directions: how many are curved, the eigenvalues tell."""
    return formulas.leading_couplings(formulas.coupling_matrix(_rotated(options, covariance, directions, draw)))
