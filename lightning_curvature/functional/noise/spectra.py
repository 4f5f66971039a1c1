r"""Spectra of the Hessians of single samples, and what the noise and the curvature owe to them.

Legend: h_p the Hessian of sample p, κ_m its eigenvalues and u_m its eigenvectors, descending; v_i the eigenvectors of
H = E_p[h_p], as rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class SampleSpectra(NamedTuple):
    """Eigenpairs of the Hessians of n samples.

    Attributes:
        values: κ, (n, m) float64, descending.
        overlaps: (u_m · v_i)², (n, m, 𝒩) float64.
    """

    values: Tensor
    overlaps: Tensor


def linear_sample_spectra(activations: Tensor, curvatures: Tensor, vectors: Tensor) -> SampleSpectra:
    r"""Return the eigenpairs of h_p = S_p ⊗ a_p a_pᵀ, from those of S_p, (σ_m, s_m).

    .. math:: \kappa_m = \sigma_m \lVert a\rVert^2, \qquad u_m = s_m \otimes a / \lVert a\rVert

    All other eigenvalues are zero: an out × out problem in place of one of out · in. They are left out also where they
    would come first, for a negative definite S.

    Args:
        activations: a, (n, in).
        curvatures: S, (n, out, out).
        vectors: v_i, (𝒩, out · in).

    Returns:
        m = out eigenpairs a sample.

    Source: exact for a weight that enters once, as z = W a; P2 decomposes h_p itself (eq. 23).

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


def dense_sample_spectra(hessians: Tensor, vectors: Tensor) -> SampleSpectra:
    """Return the eigenpairs of given Hessians, all D of each.

    Args:
        hessians: h, (n, D, D).
        vectors: v_i, (𝒩, D).

    Source: P2, eq. 23.

    Example:
        >>> dense_sample_spectra(torch.tensor([[[2.0, 0.0], [0.0, 5.0]]]), torch.tensor([[0.0, 1.0]])).values
        tensor([[5., 2.]], dtype=torch.float64)
    """
    values, own = torch.linalg.eigh(hessians.double())
    return SampleSpectra(values.flip(-1), (own.flip(-1).mT @ vectors.double().mT).square())


def spectral_moments(spectra: SampleSpectra) -> tuple[Tensor, Tensor]:
    r"""Return H_ii and 2b C_ii/σ_w² from eigenpairs of single samples, (𝒩,) float64 each.

    .. math:: H_{ii} = E_p \sum_m \kappa_m (u_m \cdot v_i)^2, \qquad
        \frac{2b}{\sigma_w^2} C_{ii} = E_p \sum_m \kappa_m^2 (u_m \cdot v_i)^2

    Args:
        spectra: of the samples; changed values as of :func:`suppressed` give those of the changed landscape.

    Source: P2, eqs. 15–17 and 27.

    Example:
        >>> spectral_moments(dense_sample_spectra(torch.diag(torch.tensor([3.0, 1.0]))[None], torch.eye(2)))
        (tensor([3., 1.], dtype=torch.float64), tensor([9., 1.], dtype=torch.float64))
    """
    values, overlaps = spectra
    count = len(values)
    return (
        torch.einsum("nm,nmi->i", values, overlaps) / count,
        torch.einsum("nm,nmi->i", values.square(), overlaps) / count,
    )


def spectral_covariance(second_moment: Tensor, weight_variance: float, batch_size: int = 1) -> Tensor:
    r"""Return the noise covariance that the activity–weight duality gives.

    .. math:: C = \frac{\sigma_w^2}{2b} E_p[h_p^2], \qquad
        C_{ij} = \frac{\sigma_w^2}{2b} E_p \sum_m \kappa_m^2 (u_m \cdot v_i)(u_m \cdot v_j)

    Args:
        second_moment: E_p[h_p²], in any basis, (D, D), or its diagonal.
        weight_variance: σ_w².
        batch_size: b.

    Source: P2, eq. 15.

    Example:
        >>> spectral_covariance(torch.tensor([9.0, 1.0]), weight_variance=0.5, batch_size=5)
        tensor([0.4500, 0.0500])
    """
    return 0.5 * weight_variance / batch_size * second_moment


def spectral_bounds(
    curvatures: Tensor, largest: float, weight_variance: float, batch_size: int = 1
) -> tuple[Tensor, Tensor]:
    r"""Return the bounds of C_ii where the Hessians of all samples are positive semidefinite.

    .. math:: \frac{\sigma_w^2}{2b} H_{ii}^2 \le C_{ii} \le \frac{\sigma_w^2 \kappa_{\max}}{2b} H_{ii}

    Args:
        curvatures: H_ii, (𝒩,).
        largest: κ_max, over all samples.
        weight_variance: σ_w².
        batch_size: b.

    Source: P2, eq. 19.

    Example:
        >>> spectral_bounds(torch.tensor([2.0]), largest=3.0, weight_variance=0.5)
        (tensor([1.]), tensor([1.5000]))
    """
    factor = 0.5 * weight_variance / batch_size
    return factor * curvatures.square(), factor * largest * curvatures


class Suppressed(NamedTuple):
    """Changed spectra.

    Attributes:
        values: κ̃, (n, m).
        stiff: which samples are stiff, (n,) bool.
    """

    values: Tensor
    stiff: Tensor


def suppressed(
    values: Tensor, *, threshold: float = 0.1, tail: float = 1e-5, background: float = 1e-3, homogenize: bool = True
) -> Suppressed:
    r"""Return eigenvalues after the suppression experiment, which asks what the leading ones alone account for.

    A sample is stiff where κ_1 > θ · max_p κ_1. Its κ_1 becomes the mean over the stiff samples; that of others is
    scaled down, and so are all κ_m with m > 1.

    Args:
        values: κ, (n, m), descending.
        threshold: θ, below 1; negative, all samples are stiff.
        tail: factor of κ_m, m > 1.
        background: factor of κ_1 of samples that are not stiff.
        homogenize: put the mean in place of κ_1; False leaves it (rows 2 and 3 of P2's figure 13).

    Raises:
        ValueError: if no sample is stiff, or θ is not below 1.

    Source: P2, eqs. 24–26.

    Example:
        >>> suppressed(torch.tensor([[4.0, 1.0], [2.0, 1.0], [0.1, 0.0]])).values[:, 0]
        tensor([3.0000e+00, 3.0000e+00, 1.0000e-04], dtype=torch.float64)
    """
    if not threshold < 1.0:
        raise ValueError(f"threshold must be below 1, got {threshold}: P2 has 0.1, and 0.05 or 0.001 for its figures.")
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


def cumulative_contribution(spectra: SampleSpectra) -> Tensor:
    r"""Return which share of 2b C_ii/σ_w² the first k eigenvalues of all samples give, (m, 𝒩), for k = 1 … m.

    Args:
        spectra: of the samples.

    Returns:
        NaN in directions where all of them give nothing.

    Source: P2, figure 13, column 2.

    Example:
        >>> cumulative_contribution(dense_sample_spectra(torch.diag(torch.tensor([3.0, 1.0]))[None], torch.eye(2)))
        tensor([[1., 0.],
                [1., 1.]], dtype=torch.float64)
    """
    terms = torch.einsum("nm,nmi->mi", spectra.values.square(), spectra.overlaps).cumsum(0)
    return terms / torch.where(terms[-1] > 0.0, terms[-1], torch.nan)
