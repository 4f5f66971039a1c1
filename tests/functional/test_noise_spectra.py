"""Spectra of single samples: planted Hessians, the bounds of theorem 5.1, and the suppression experiment."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_curvature.functional.noise import (
    SampleSpectra,
    cumulative_contribution,
    linear_sample_spectra,
    power_law,
    spectral_moments,
    suppressed,
)
from tests.oracles.noise import Samples, layer_derivatives, planted_hessians, samples_of

# Float64 products of small matrices, each rounding by 1e-16 of its largest entry.
ROUNDING = 1e-13


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planted(positive: bool = True) -> tuple[Samples, Tensor, Tensor]:
    """Hessians of twelve samples in 9 dimensions, their three nonzero eigenvalues and the vectors."""
    values = random(12, 3)
    values = (values.square() if positive else values).sort(1, descending=True).values
    hessians, vectors = planted_hessians(values, 9)
    return Samples(torch.empty(0), hessians), values, vectors


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def dense_spectra(hessians: Tensor, basis: Tensor) -> SampleSpectra:
    """All eigenpairs of each Hessian; Zhang, Yang and Tu (2026), eq. 23."""
    values, vectors = torch.linalg.eigh(hessians.double())
    return SampleSpectra(values.flip(-1), (vectors.flip(-1).mT @ basis.double().mT).square())


def bounds(curvatures: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """Of 2b C_ii/σ_w² where all h_p are positive semidefinite; Zhang, Yang and Tu (2026), eq. 19."""
    return curvatures.square(), largest * curvatures


def aligned(counts: list[int], curvatures: list[float]) -> SampleSpectra:
    """Samples of rank one: that many have that eigenvalue, in the direction of that number."""
    which = torch.tensor([i for i, count in enumerate(counts) for _ in range(count)])
    values = torch.tensor(curvatures, dtype=torch.float64)[which][:, None]
    return SampleSpectra(values, F.one_hot(which, len(counts)).double()[:, None])


def exponent(spectra: SampleSpectra) -> float:
    return power_law(*spectral_moments(spectra)).exponent


def test_planted_spectra_are_found() -> None:
    samples, values, vectors = planted(positive=False)
    _, basis = samples.basis()
    found = dense_spectra(samples.hessians, basis)
    rank = torch.cat([values, torch.zeros(12, 6)], dim=1).sort(1, descending=True)
    assert_close(found.values, rank.values)
    overlaps = torch.einsum("nmd,id->nmi", vectors, basis).square()
    for p in range(12):
        for place, source in enumerate(rank.indices[p].tolist()):
            if source < 3:
                # Eigenvalues that are near each other mix by 1e-16 over their distance, 1e-3 at least.
                assert_close(found.overlaps[p, place], overlaps[p, source])
    first, second = spectral_moments(found)
    assert_close(first, (basis @ samples.hessian() @ basis.T).diagonal())
    assert_close(second, (basis @ samples.second_moment() @ basis.T).diagonal())
    # Known without the matrices, too.
    assert_close(second, torch.einsum("nm,nmi->i", values.square(), overlaps) / 12)


def test_bounds_hold_where_all_hessians_are_positive() -> None:
    samples, values, _ = planted()
    curvatures, basis = samples.basis()
    variances = (basis @ samples.second_moment() @ basis.T).diagonal()
    lower, upper = bounds(curvatures, float(values.max()))
    assert bool((lower <= variances).all())
    assert bool((variances <= upper).all())
    # They are not empty: half of κ_max is too little, and twice the lower one too much, somewhere.
    assert not bool((variances <= bounds(curvatures, 0.5 * float(values.max()))[1]).all())


def test_bounds_hold_for_a_convex_loss() -> None:
    """Softmax regression: h_p = (diag π − ππᵀ) ⊗ a aᵀ is positive semidefinite at any weight."""
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(5, 4)), random(20, 5), torch.arange(20) % 4
    dense = samples_of(model, F.cross_entropy, "0.weight", x, y)
    a, _, s = layer_derivatives(model, F.cross_entropy, "0.weight", x, y)
    curvatures, basis = dense.basis()
    spectra = linear_sample_spectra(a, s, basis)
    first, variances = spectral_moments(spectra)
    lower, upper = bounds(first, float(spectra.values.max()))
    # (Σ π = 1 gives five directions without curvature, where all three are 0 up to rounding.)
    assert bool((lower <= variances + ROUNDING).all())
    assert bool((variances <= upper + ROUNDING).all())
    assert_close(first, curvatures)


def test_bounds_are_reached() -> None:
    """Below by a curvature that all samples share, above by samples of rank one with one eigenvalue."""
    values = torch.tensor([3.0, 2.0, 0.5], dtype=torch.float64)
    first, second = spectral_moments(dense_spectra(torch.diag(values).expand(4, 3, 3), torch.eye(3)))
    assert_close(second, bounds(first, 3.0)[0])
    first, second = spectral_moments(aligned([5, 3, 1], [2.0] * 3))
    assert_close(second, bounds(first, 2.0)[1])


def test_exponents_of_the_limits_of_the_theory() -> None:
    # Zhang, Yang and Tu (2026), proposition 5.3: common eigenvectors, and eigenvalues λ_i ξ_p whose scatter is in
    # proportion to their mean.
    scales, values = random(30, 1).exp(), torch.tensor([8.0, 4.0, 1.0, 0.1], dtype=torch.float64)
    stretched = SampleSpectra(scales * values, torch.eye(4, dtype=torch.float64).expand(30, 4, 4))
    assert exponent(stretched) == pytest.approx(2.0, abs=1e-12)
    # Proposition 5.5: one eigenvalue for all.
    assert exponent(aligned([8, 4, 2, 1], [0.3] * 4)) == pytest.approx(1.0, abs=1e-12)
    # In between: stiffer samples point where more of them do. n·κ against n·κ² with κ = n.
    assert exponent(aligned([8, 4, 2, 1], [8.0, 4.0, 2.0, 1.0])) == pytest.approx(1.5, abs=1e-12)


@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.3, 0.99])
@pytest.mark.parametrize("homogenize", [True, False])
def test_suppression_by_cases(threshold: float, homogenize: bool) -> None:
    """Zhang, Yang and Tu (2026), eqs. 24–26, with samples of no positive eigenvalue among them."""
    values = random(14, 4).sort(1, descending=True).values - 0.5
    assert bool((values[:, 0] < 0.0).any())
    limit = threshold * max(row[0] for row in values.tolist())
    stiff = [threshold < 0.0 or row[0] > limit for row in values.tolist()]
    mean = sum(row[0] for row, is_stiff in zip(values.tolist(), stiff, strict=True) if is_stiff) / sum(stiff)
    found = suppressed(values, threshold=threshold, tail=0.2, background=0.05, homogenize=homogenize)
    assert found.stiff.tolist() == stiff
    for p, row in enumerate(values.tolist()):
        first = (mean if homogenize else row[0]) if stiff[p] else 0.05 * row[0]
        assert found.values[p].tolist() == pytest.approx([first, *(0.2 * v for v in row[1:])], rel=ROUNDING)


def test_suppression_of_nothing_changes_nothing() -> None:
    values = random(6, 3).sort(1, descending=True).values
    before = values.clone()
    assert suppressed(values, tail=1.0, background=1.0, homogenize=False).values.equal(values)
    suppressed(values)
    assert values.equal(before)
    # The factors of the source.
    found = suppressed(torch.tensor([[10.0, 4.0], [1.1, 1.0], [1.0, 1.0]], dtype=torch.float64))
    assert found.stiff.tolist() == [True, True, False]
    assert_close(found.values, torch.tensor([[5.55, 4e-5], [5.55, 1e-5], [1e-3, 1e-5]], dtype=torch.float64))


def test_equal_leading_eigenvalues_give_one() -> None:
    """What the experiment is for: γ = 1.5 comes of stiffer samples that point where more of them do."""
    before = aligned([8, 4, 2, 1], [8.0, 4.0, 2.0, 1.0])
    after = SampleSpectra(suppressed(before.values).values, before.overlaps)
    assert exponent(before) == pytest.approx(1.5, abs=1e-12)
    assert exponent(after) == pytest.approx(1.0, abs=1e-12)


def test_suppression_is_the_same_for_all_eigenvalues_and_for_those_that_are_not_zero() -> None:
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), random(10, 4), torch.arange(10) % 3
    dense = samples_of(model, F.cross_entropy, "0.weight", x, y)
    a, _, s = layer_derivatives(model, F.cross_entropy, "0.weight", x, y)
    _, basis = dense.basis()
    moments = []
    for spectra in (linear_sample_spectra(a, s, basis), dense_spectra(dense.hessians, basis)):
        changed = suppressed(spectra.values, threshold=0.3, tail=1e-2)
        assert 0 < int(changed.stiff.sum()) < 10
        moments.append(torch.stack(spectral_moments(SampleSpectra(changed.values, spectra.overlaps))))
    assert_close(moments[0], moments[1])


def test_cumulative_contribution() -> None:
    samples, _, _ = planted()
    spectra = dense_spectra(samples.hessians, samples.basis()[1])
    found = cumulative_contribution(spectra)
    assert found.shape == (9, 9)
    for k in (0, 2, 8):
        for i in (0, 8):
            terms = [
                sum(float(spectra.values[p, m] ** 2 * spectra.overlaps[p, m, i]) for p in range(12)) for m in range(9)
            ]
            assert float(found[k, i]) == pytest.approx(sum(terms[: k + 1]) / sum(terms), rel=1e-11)
    nothing = cumulative_contribution(SampleSpectra(torch.zeros(2, 1), torch.ones(2, 1, 3)))
    assert bool(nothing.isnan().all())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: suppressed(-torch.ones(3, 2)), "largest eigenvalue is positive, got at most -1.0: take other samples"),
        (lambda: suppressed(torch.ones(3, 2), threshold=1.0), "threshold must be below 1, got 1.0: 0.1 is usual"),
        (lambda: suppressed(torch.ones(3, 2), threshold=math.nan), "threshold must be below 1, got nan"),
    ],
)
def test_bad_input(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
