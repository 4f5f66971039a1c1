r"""Sums over samples of Kronecker products B_p ⊗ a_p a_pᵀ, the form of all second-order statistics of a linear layer.

A weight W (out, in) that enters the loss of a sample once, as z = W a, has, with δ = ∂ℓ/∂z and S = ∂²ℓ/∂z∂zᵀ,

.. math:: g = \delta \otimes a, \qquad g g^\top = \delta\delta^\top \otimes a a^\top, \qquad
    h = S \otimes a a^\top, \qquad h^2 = \lVert a\rVert^2 S^2 \otimes a a^\top .

Both factors are symmetric: one matrix product over all samples sums their upper triangles, a quarter of the work.
Entries of W are in row-major order: W[o, i] is number o · in + i of D = out · in.
"""

import torch
from torch import Tensor

from lightning_curvature.arguments import MANY, checked, sentence, shaped, whole

# Numbers of a aᵀ in memory at a time: 64 MB in float64.
_PIECE = 2**23
SIZE = whole(1, "count the outputs or inputs of the layer", MANY)
_BLOCKS, _ACTIVATIONS = (shaped(shape, "give one of each a sample") for shape in ("n q out out", "n in"))


@checked(blocks=_BLOCKS, activations=_ACTIVATIONS)
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
    count, kinds, out, _ = blocks.shape
    rows = torch.triu_indices(out, out, device=blocks.device)
    columns = torch.triu_indices(activations.shape[1], activations.shape[1], device=activations.device)
    width = columns.shape[1]
    if total is None:
        total = torch.zeros(kinds, rows.shape[1], width, dtype=torch.float64, device=blocks.device)
    _check_packed("total", total, (kinds, out, activations.shape[1]), "these blocks and activations")
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

    @checked(kinds=whole(1, "count the matrices of a sample", MANY), out=SIZE, into=SIZE)
    def __init__(self, kinds: int, out: int, into: int, device: torch.device | str = "cpu") -> None:
        self._sizes = (kinds, out, into)
        self._total = torch.zeros(_packed(self._sizes), dtype=torch.float64, device=device)
        self._waiting: list[tuple[Tensor, Tensor]] = []

    @checked(blocks=_BLOCKS, activations=_ACTIVATIONS)
    def add(self, blocks: Tensor, activations: Tensor) -> None:
        """Add samples: (n, q, out, out) and (n, in)."""
        for name, given, size in (
            ("blocks", tuple(blocks.shape[1:3]), self._sizes[:2]),
            ("activations", tuple(activations.shape[1:]), self._sizes[2:]),
        ):
            if given != size:
                raise sentence(name, f"have the sizes {size} of the sum after n", given, "give samples of one layer")
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


@checked(sums=shaped("q! rows columns", "make them by kronecker_sums"), out=SIZE, into=SIZE)
def unpacked(sums: Tensor, out: int, into: int) -> Tensor:
    """Return packed sums of :func:`kronecker_sums` for a weight (``out``, ``into``) as full matrices, (q, D, D).

    Example:
        >>> unpacked(torch.tensor([[[1.0, 2.0, 4.0]]]), 1, 2)  # (1, 1), (1, 2), (2, 2)
        tensor([[[1., 2.],
                 [2., 4.]]])
    """
    _check_packed("sums", sums, (len(sums), out, into), f"out = {out} and into = {into}")
    size = out * into
    matrices = [
        one[_places(out, one.device)][:, :, _places(into, one.device)].permute(0, 2, 1, 3).reshape(size, size)
        for one in sums
    ]
    return torch.stack(matrices)


def _packed(sizes: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return the shape of packed sums of q, out and in."""
    kinds, out, into = sizes
    return kinds, out * (out + 1) // 2, into * (into + 1) // 2


def _check_packed(name: str, sums: Tensor, sizes: tuple[int, int, int], of: str) -> None:
    """Raise unless sums have the shape that q, out and in give."""
    if sums.shape != _packed(sizes):
        raise sentence(name, f"be {_packed(sizes)} for {of}", tuple(sums.shape), "make it by kronecker_sums")


def _places(size: int, device: torch.device) -> Tensor:
    """Return the place of each entry of a symmetric matrix in its packed upper triangle, (size, size)."""
    rows, columns = torch.triu_indices(size, size, device=device)
    places = torch.zeros(size, size, dtype=torch.long, device=device)
    places[rows, columns] = places[columns, rows] = torch.arange(len(rows), device=device)
    return places


@checked(activations=shaped("n in"), gradients=shaped("n out"), curvatures=shaped("n out out"))
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
