r"""Sums over samples of Kronecker products B_p ⊗ a_p a_pᵀ, the form of all second-order statistics of a linear layer.

A weight W (out, in) that enters the loss of a sample once, as z = W a, has, with δ = ∂ℓ/∂z and S = ∂²ℓ/∂z∂zᵀ,

.. math:: g = \delta \otimes a, \qquad g g^\top = \delta\delta^\top \otimes a a^\top, \qquad
    h = S \otimes a a^\top, \qquad h^2 = \lVert a\rVert^2 S^2 \otimes a a^\top .

Both factors are symmetric: one matrix product over all samples sums their upper triangles, a quarter of the work.
Entries of W are in row-major order: W[o, i] is number o · in + i of D = out · in.
"""

import torch
from torch import Tensor

# Numbers of a aᵀ in memory at a time: 64 MB in float64.
_PIECE = 2**23


def kronecker_sums(blocks: Tensor, activations: Tensor, total: Tensor | None = None) -> Tensor:
    r"""Return :math:`\sum_p B_p \otimes a_p a_p^\top` in packed form; packed sums merge by addition.

    Args:
        blocks: B, (n, q, out, out): q symmetric matrices of each sample.
        activations: a, (n, in).
        total: packed sums to add to, in place.

    Returns:
        (q, out (out + 1) / 2, in (in + 1) / 2) float64; see :func:`unpacked`.

    Raises:
        ValueError: if the shapes do not agree.

    Example:
        >>> sums = kronecker_sums(torch.ones(1, 1, 1, 1), torch.tensor([[1.0, 2.0]]))
        >>> unpacked(sums, 1, 2)
        tensor([[[1., 2.],
                 [2., 4.]]], dtype=torch.float64)
    """
    shapes = blocks.ndim == 4 and blocks.shape[2] == blocks.shape[3] and activations.ndim == 2
    if not shapes or len(blocks) != len(activations):
        raise ValueError(
            f"blocks and activations must be (n, q, out, out) and (n, in), got {tuple(blocks.shape)} and "
            f"{tuple(activations.shape)}: give one of each a sample."
        )
    count, kinds, out, _ = blocks.shape
    rows = torch.triu_indices(out, out, device=blocks.device)
    columns = torch.triu_indices(activations.shape[1], activations.shape[1], device=activations.device)
    width = columns.shape[1]
    if total is None:
        total = torch.zeros(kinds, rows.shape[1], width, dtype=torch.float64, device=blocks.device)
    flat = total.view(-1, width)
    piece = max(1, _PIECE // max(width, len(flat)))
    for first in range(0, count, piece):
        b, a = (t[first : first + piece].double() for t in (blocks, activations))
        packed = b[:, :, rows[0], rows[1]].flatten(1)
        flat.addmm_(packed.mT, a[:, columns[0]] * a[:, columns[1]])
    return total


class KroneckerSum:
    """The sum of :func:`kronecker_sums` over small batches, collected before they are multiplied.

    ``kinds`` is q, and the weight is (``out``, ``into``).
    """

    # Numbers that are collected, 32 MB: each product writes all of the sum.
    _MOST = 2**22

    def __init__(self, kinds: int, out: int, into: int, device: torch.device | str = "cpu") -> None:
        shape = (kinds, out * (out + 1) // 2, into * (into + 1) // 2)
        self._total = torch.zeros(shape, dtype=torch.float64, device=device)
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def add(self, blocks: Tensor, activations: Tensor) -> None:
        """Add samples: (n, q, out, out) and (n, in)."""
        self._waiting.append((blocks, activations))
        if sum(b.numel() for b, _ in self._waiting) >= self._MOST:
            self.packed()

    def packed(self) -> Tensor:
        """Return the sum, (q, out (out + 1) / 2, in (in + 1) / 2)."""
        if self._waiting:
            blocks, activations = zip(*self._waiting, strict=True)
            self._waiting = []
            kronecker_sums(torch.cat(blocks), torch.cat(activations), self._total)
        return self._total


def unpacked(sums: Tensor, out: int, into: int) -> Tensor:
    """Return packed sums of :func:`kronecker_sums` for a weight (``out``, ``into``) as full matrices, (q, D, D).

    Example:
        >>> unpacked(torch.tensor([[[1.0, 2.0, 4.0]]]), 1, 2)  # (1, 1), (1, 2), (2, 2)
        tensor([[[1., 2.],
                 [2., 4.]]])
    """
    size = out * into
    matrices = [
        one[_places(out, one.device)][:, :, _places(into, one.device)].permute(0, 2, 1, 3).reshape(size, size)
        for one in sums
    ]
    return torch.stack(matrices)


def _places(size: int, device: torch.device) -> Tensor:
    """Return the place of each entry of a symmetric matrix in its packed upper triangle, (size, size)."""
    rows, columns = torch.triu_indices(size, size, device=device)
    places = torch.zeros(size, size, dtype=torch.long, device=device)
    places[rows, columns] = places[columns, rows] = torch.arange(len(rows), device=device)
    return places


def linear_blocks(activations: Tensor, gradients: Tensor, curvatures: Tensor) -> Tensor:
    r"""Return the blocks of g gᵀ, h and h², (n, 3, out, out) float64, from a (n, in), δ (n, out) and S (n, out, out).

    Example:
        >>> linear_blocks(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]]), torch.tensor([[[2.0]]])).flatten()
        tensor([ 9.,  2., 20.], dtype=torch.float64)
    """
    delta, s = gradients.double(), curvatures.double()
    s = 0.5 * (s + s.mT)
    length = activations.double().square().sum(-1)[:, None, None]
    return torch.stack([delta[:, :, None] * delta[:, None, :], s, length * (s @ s)], dim=1)
