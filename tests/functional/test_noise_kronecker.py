"""Sums of Kronecker products against dense derivatives of single samples."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_curvature.functional.noise import (
    SampleSpectra,
    covariance_of_sums,
    kronecker,
    kronecker_sums,
    linear_blocks,
    linear_sample_spectra,
    spectral_moments,
    unpacked,
)
from tests.oracles.noise import Samples, descending, layer_derivatives, samples_of

# Of the largest entry. Both routes are float64 sums of some hundred products: far below what is asked of them.
SAME = 1e-10


def squared_error_after_softmax(outputs: Tensor, targets: Tensor) -> Tensor:
    """The other loss of Zhang, Yang and Tu (2026)."""
    return (outputs.softmax(-1) - F.one_hot(targets, outputs.shape[-1])).square().sum(-1).mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": F.cross_entropy,
    "squared_error": squared_error_after_softmax,
}


def network(activation: type[nn.Module], bias: bool) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(4, 6, bias=bias), activation(), nn.Linear(6, 5, bias=bias), activation(), nn.Linear(5, 3, bias=bias)
    ).double()


def data(count: int = 9) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return 2.0 * torch.randn(count, 4, generator=g, dtype=torch.float64), torch.randint(3, (count,), generator=g)


def assert_same(found: Tensor, expected: Tensor) -> None:
    largest = float(expected.abs().max())
    assert largest > 0.0
    torch.testing.assert_close(found, expected, rtol=0.0, atol=SAME * largest)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize(("name", "bias"), [("0.weight", False), ("2.weight", True), ("4.weight", False)])
def test_sums_equal_dense_derivatives(name: str, bias: bool, activation: type[nn.Module], loss: str) -> None:
    """C, H and E[h²], of weights that are not square, behind and in front of kinks and curves."""
    model, (x, y) = network(activation, bias), data()
    dense = samples_of(model, LOSSES[loss], name, x, y)
    a, delta, s = layer_derivatives(model, LOSSES[loss], name, x, y)
    out, into = model.get_parameter(name).shape
    moment, hessian, square = unpacked(kronecker_sums(linear_blocks(a, delta, s), a), out, into)
    assert_same((delta[:, :, None] * a[:, None, :]).flatten(1), dense.gradients)
    covariance = covariance_of_sums(moment, (delta.T @ a).flatten(), len(y), batch_size=3)
    assert_same(covariance, dense.covariance(batch_size=3))
    assert_same(hessian / len(y), dense.hessian())
    assert_same(square / len(y), dense.second_moment())


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_spectra_of_single_samples_equal_dense_ones(activation: type[nn.Module], loss: str) -> None:
    """Eigenvalues, and in directions that are nobody's eigenvectors the projections on their eigenspaces."""
    model, (x, y) = network(activation, True), data()
    dense = samples_of(model, LOSSES[loss], "2.weight", x, y)
    a, _, s = layer_derivatives(model, LOSSES[loss], "2.weight", x, y)
    directions = torch.linalg.qr(torch.randn(30, 8, dtype=torch.float64)).Q.T
    found = linear_sample_spectra(a, s, directions)
    assert (found.values.shape, found.overlaps.shape) == ((9, 5), (9, 5, 8))
    assert bool((found.values.diff(dim=1) <= 0.0).all())
    for p in range(9):
        values, vectors = descending(dense.hessians[p])
        largest = values[values.abs().argsort(descending=True)[:5]].sort(descending=True).values
        assert_same(found.values[p], largest)
        # Whole functions of the matrix, as eigenvectors of eigenvalue 0 are anyone's.
        for power in (1, 2, 3):
            expected = (directions @ (vectors.T * values**power) @ vectors @ directions.T).diagonal()
            assert_same(found.values[p] ** power @ found.overlaps[p], expected)


def test_sums_over_samples_come_in_pieces_and_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    blocks = torch.randn(11, 2, 3, 3, generator=g, dtype=torch.float64)
    blocks, a = blocks + blocks.mT, torch.randn(11, 4, generator=g, dtype=torch.float64)
    expected = torch.zeros(2, 12, 12, dtype=torch.float64)
    for block, one in zip(blocks, a, strict=True):
        for q in range(2):
            expected[q] += torch.kron(block[q], torch.outer(one, one))
    for piece in (1, 40, 2**23):
        monkeypatch.setattr(kronecker, "_PIECE", piece)
        assert_same(unpacked(kronecker_sums(blocks, a), 3, 4), expected)
    parts = kronecker_sums(blocks[:3], a[:3]) + kronecker_sums(blocks[3:], a[3:])
    assert_same(unpacked(parts, 3, 4), expected)
    assert unpacked(kronecker_sums(blocks[:0], a[:0]), 3, 4).abs().max() == 0.0


def test_kronecker_sums_are_in_float64() -> None:
    """1 + 2⁻³⁰ is 1 in float32."""
    blocks = torch.ones(2, 1, 1, 1)
    assert kronecker_sums(blocks, torch.tensor([[1.0], [2.0**-15]])).item() == 1.0 + 2.0**-30
    assert linear_blocks(torch.ones(1, 1), torch.ones(1, 1), torch.ones(1, 1, 1)).dtype == torch.float64


def test_a_dead_sample_has_no_curvature() -> None:
    spectra = linear_sample_spectra(torch.zeros(1, 3), torch.eye(2)[None], torch.eye(6))
    assert spectra.values.tolist() == [[0.0, 0.0]]
    assert [float(moment.abs().max()) for moment in spectral_moments(spectra)] == [0.0, 0.0]


def test_spectral_forms_equal_direct_ones() -> None:
    """Zhang, Yang and Tu (2026), eqs. 16 and 17, in the eigenbasis of H; and the sum over samples is that of parts."""
    model, (x, y) = network(nn.Tanh, False), data()
    dense: Samples = samples_of(model, F.cross_entropy, "0.weight", x, y)
    a, _, s = layer_derivatives(model, F.cross_entropy, "0.weight", x, y)
    values, vectors = dense.basis()
    found = linear_sample_spectra(a, s, vectors[:10])
    first, second = spectral_moments(found)
    assert_same(first, values[:10])
    assert_same(second, (vectors @ dense.second_moment() @ vectors.T).diagonal()[:10])
    # All of an eigenvector lies in a complete basis.
    torch.testing.assert_close(
        linear_sample_spectra(a, s, vectors).overlaps.sum(-1), torch.ones(9, 6, dtype=torch.float64)
    )
    parts = [spectral_moments(SampleSpectra(found.values[part], found.overlaps[part])) for part in ([0, 1, 2], [3, 4])]
    whole = spectral_moments(SampleSpectra(found.values[:5], found.overlaps[:5]))
    for i in range(2):
        assert_same((3.0 * parts[0][i] + 2.0 * parts[1][i]) / 5.0, whole[i])


@pytest.mark.parametrize(
    ("blocks", "activations"),
    [((2, 1, 3, 3), (3, 4)), ((2, 1, 3, 2), (2, 4)), ((2, 3, 3), (2, 4)), ((2, 1, 3, 3), (2,))],
)
def test_bad_shapes(blocks: tuple[int, ...], activations: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must be \(n, (q, out, out|in)\).*, got .* give one of each a sample"):
        kronecker_sums(torch.ones(blocks), torch.ones(activations))
