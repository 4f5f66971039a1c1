"""The covariance of the gradient noise of SGD, and the eigenbasis of the Hessian in which it is compared."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_curvature.arguments import Rule, checked, sentence, shaped, whole

_ONE = whole(1, "1 is a single sample")
_TOP = Rule("40 % of the directions are usual")
_PRODUCTS, _GRADIENT = shaped("D D", "add up g gᵀ of all samples"), shaped("D", "add up g of all samples")


@checked(gradients=shaped("n! D", "give one row a sample"), batch_size=_ONE)
def noise_covariance(gradients: Tensor, batch_size: int = 1) -> Tensor:
    r"""Return the covariance of the gradient of a mini-batch that is drawn from the given samples.

    .. math:: C = \frac1b \left( \frac1n \sum_i g_i g_i^\top - \bar g \bar g^\top \right)

    Args:
        gradients: g of single samples, (n, D).
        batch_size: b; 1 gives the covariance of single samples.

    Returns:
        C, (D, D) float64, in (units of the loss)² / (units of the parameters)².

    Raises:
        ValueError: if there is no sample, or b is below 1.

    Source: Zhang, Yang and Tu (2026), eq. 2 (drawn with replacement).

    Example:
        >>> noise_covariance(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), batch_size=2)
        tensor([[0.5000, 0.0000],
                [0.0000, 0.0000]], dtype=torch.float64)
    """
    gradients = gradients.double()
    # About the mean: a difference of second moments loses the digits of a scatter that is small beside the mean.
    gradients = gradients - gradients.mean(0)
    return covariance_of_sums(gradients.mT @ gradients, gradients.sum(0), len(gradients), batch_size)


@checked(products=_PRODUCTS, gradient=_GRADIENT, samples=_ONE, batch_size=_ONE)
def covariance_of_sums(products: Tensor, gradient: Tensor, samples: int, batch_size: int = 1) -> Tensor:
    """Return the covariance of :func:`noise_covariance` from sums over n samples, which merge by addition.

    ``products`` is Σ g gᵀ, (D, D) float64, and ``gradient`` is Σ g, (D,) float64.

    Raises:
        ValueError: if n or b is below 1.

    Example:
        >>> covariance_of_sums(torch.tensor([[10.0]]), torch.tensor([4.0]), samples=2)  # of 1 and 3
        tensor([[1.]])
    """
    mean = gradient / samples
    return (products / samples - torch.outer(mean, mean)) / batch_size


class CurvatureBasis(NamedTuple):
    """The leading eigenvectors of a Hessian.

    Attributes:
        values: H_ii, descending (algebraically), (𝒩,) float64.
        vectors: v_i as rows, (𝒩, D) float64.
    """

    values: Tensor
    vectors: Tensor


@checked(size=whole(1, "count the directions"))
def default_top(size: int) -> int:
    """Return the default 𝒩: 40 % of the directions, 1000 of 2500 in table 2 of Zhang, Yang and Tu (2026).

    Example:
        >>> default_top(2500), default_top(4)  # at least three, for a power law
        (1000, 3)
    """
    return max(math.ceil(0.4 * size), min(3, size))


@checked(hessian=shaped("D D", "give a square matrix"), top=_TOP)
def curvature_basis(hessian: Tensor, top: int | None = None) -> CurvatureBasis:
    """Return the eigenvectors of the largest eigenvalues.

    Args:
        hessian: H, (D, D) symmetric.
        top: 𝒩, number of eigenvectors; None for 40 % of D.

    Raises:
        ValueError: if H is not square, or 𝒩 is not between 1 and D.

    Example:
        >>> curvature_basis(torch.diag(torch.tensor([-1.0, 3.0, 2.0])), top=2).values
        tensor([3., 2.], dtype=torch.float64)
    """
    size = len(hessian)
    count = default_top(size) if top is None else top
    if not 1 <= count <= size:
        raise sentence("top", f"be between 1 and D = {size}", top, _TOP.remedy)
    values, vectors = torch.linalg.eigh(hessian.double())
    return CurvatureBasis(values[-count:].flip(0), vectors[:, -count:].flip(1).mT.contiguous())


@checked(matrix=shaped("D D"), vectors=shaped("N D", "give vectors as rows"))
def in_basis(matrix: Tensor, vectors: Tensor) -> Tensor:
    """Return VMVᵀ, (𝒩, 𝒩) float64, for a matrix M, (D, D), and vectors as the rows of V, (𝒩, D).

    Example:
        >>> in_basis(torch.tensor([[1.0, 2.0], [2.0, 5.0]]), torch.tensor([[0.0, 1.0]]))
        tensor([[5.]], dtype=torch.float64)
    """
    vectors = vectors.double()
    return vectors @ matrix.double() @ vectors.mT
