r"""Spectra of the Hessians of single samples, and the noise and curvature that follow from them.

Legend: h_p the Hessian of sample p, κ_m its eigenvalues and u_m its eigenvectors, descending; v_i the eigenvectors of
H = E_p[h_p], as rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_curvature.arguments import Rule, checked, not_negative, shaped

_FACTOR = not_negative("0 removes an eigenvalue, 1 keeps it")
_SPECTRA = Rule("linear_sample_spectra makes them")


class SampleSpectra(NamedTuple):
    """Eigenpairs of the Hessians of n samples.

    Attributes:
        values: κ, (n, m) float64, descending.
        overlaps: (u_m · v_i)², (n, m, 𝒩) float64.
    """

    values: Tensor
    overlaps: Tensor


@checked(activations=shaped("n in"), curvatures=shaped("n out out"), vectors=shaped("N out*in", "give vectors as rows"))
def linear_sample_spectra(activations: Tensor, curvatures: Tensor, vectors: Tensor) -> SampleSpectra:
    r"""Return m = out eigenpairs of each h_p = S_p ⊗ a_p a_pᵀ, from those of S_p, (σ_m, s_m).

    .. math:: \kappa_m = \sigma_m \lVert a\rVert^2, \qquad u_m = s_m \otimes a / \lVert a\rVert

    All other eigenvalues are zero: an out × out problem replaces one of size out · in. The zeros are left out, also
    where they would come first, for a negative definite S.

    Args:
        activations: a, (n, in).
        curvatures: S, (n, out, out).
        vectors: v_i, (𝒩, out · in).

    Source: exact for a weight that enters once, as z = W a; Zhang, Yang and Tu (2026) decompose h_p (eq. 23).

    Example:
        >>> spectra = linear_sample_spectra(torch.tensor([[2.0]]), torch.tensor([[[3.0]]]), torch.ones(1, 1))
        >>> spectra.values, spectra.overlaps
        (tensor([[12.]], dtype=torch.float64), tensor([[[1.]]], dtype=torch.float64))
    """
    a, s = activations.double(), curvatures.double()
    sigma, directions = torch.linalg.eigh(0.5 * (s + s.mT))
    sigma, directions = sigma.flip(-1), directions.flip(-1)
    length = a.norm(dim=-1, keepdim=True)
    unit = a / torch.where(length > 0.0, length, 1.0)
    v = vectors.double().reshape(len(vectors), s.shape[-1], a.shape[-1])
    # v_i as a matrix, applied to a from the right and to s from the left.
    reached = torch.einsum("toi,ni->not", v, unit)
    return SampleSpectra(sigma * length.square(), (directions.mT @ reached).square())


@checked(spectra=_SPECTRA)
def spectral_moments(spectra: SampleSpectra) -> tuple[Tensor, Tensor]:
    r"""Return H_ii and 2b C_ii/σ_w² from eigenpairs of single samples, (𝒩,) each.

    .. math:: H_{ii} = E_p \sum_m \kappa_m (u_m \cdot v_i)^2, \qquad
        \frac{2b}{\sigma_w^2} C_{ii} = E_p \sum_m \kappa_m^2 (u_m \cdot v_i)^2

    With values changed by :func:`suppressed` they are the moments of the changed landscape.

    Source: Zhang, Yang and Tu (2026), eqs. 15–17 and 27. Where all h_p are positive semidefinite, the second moment
    lies between H_ii² and κ_max H_ii (eq. 19).

    Example:
        >>> spectral_moments(SampleSpectra(torch.tensor([[3.0, 1.0]]), torch.eye(2)[None]))
        (tensor([3., 1.]), tensor([9., 1.]))
    """
    values, overlaps = spectra
    count = len(values)
    return (
        torch.einsum("nm,nmi->i", values, overlaps) / count,
        torch.einsum("nm,nmi->i", values.square(), overlaps) / count,
    )


class Suppressed(NamedTuple):
    """Changed eigenvalues κ̃, (n, m), and which samples are stiff, (n,) bool."""

    values: Tensor
    stiff: Tensor


@checked(
    values=shaped("n! m!", "give one row a sample"),
    threshold=Rule("0.1 is usual", below=1.0),
    tail=_FACTOR,
    background=_FACTOR,
)
def suppressed(
    values: Tensor, *, threshold: float = 0.1, tail: float = 1e-5, background: float = 1e-3, homogenize: bool = True
) -> Suppressed:
    r"""Return the eigenvalues of the suppression experiment, which isolates the effect of the leading ones.

    A sample is stiff if κ_1 > θ · max_p κ_1. The mean over the stiff samples replaces their κ_1; the κ_1 of the others
    and every κ_m with m > 1 are scaled down.

    Args:
        values: κ, (n, m), descending.
        threshold: θ, below 1; a negative one makes all samples stiff.
        tail: factor of κ_m, m > 1.
        background: factor of κ_1 of samples that are not stiff.
        homogenize: replace κ_1 by the mean; False keeps it (rows 2 and 3 of figure 13 of the source).

    Raises:
        ValueError: if no sample is stiff, or θ is not below 1.

    Source: Zhang, Yang and Tu (2026), eqs. 24–26.

    Example:
        >>> suppressed(torch.tensor([[4.0, 1.0], [2.0, 1.0], [0.1, 0.0]])).values[:, 0]
        tensor([3.0000e+00, 3.0000e+00, 1.0000e-04], dtype=torch.float64)
    """
    values = values.double()
    first = values[:, 0]
    stiff = first > threshold * first.max() if threshold >= 0.0 else torch.ones_like(first, dtype=torch.bool)
    if not bool(stiff.any()):
        raise ValueError(
            f"values must hold a sample whose largest eigenvalue is positive, got at most {float(first.max())}: take "
            "other samples."
        )
    changed = tail * values
    leading = first[stiff].mean().expand_as(first) if homogenize else first
    changed[:, 0] = torch.where(stiff, leading, background * first)
    return Suppressed(changed, stiff)


@checked(spectra=_SPECTRA)
def cumulative_contribution(spectra: SampleSpectra) -> Tensor:
    r"""Return the share of 2b C_ii/σ_w² from the first k eigenvalues of all samples, (m, 𝒩), for k = 1 … m.

    The shares are NaN in directions without noise.

    Source: Zhang, Yang and Tu (2026), figure 13, column 2.

    Example:
        >>> cumulative_contribution(SampleSpectra(torch.tensor([[3.0, 1.0]]), torch.eye(2)[None]))
        tensor([[1., 0.],
                [1., 1.]])
    """
    terms = torch.einsum("nm,nmi->mi", spectra.values.square(), spectra.overlaps).cumsum(0)
    return terms / torch.where(terms[-1] > 0.0, terms[-1], torch.nan)
