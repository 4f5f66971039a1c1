"""How far eigenvalues are beyond Ritz values, against dense matrices in float64."""

import pytest
import torch
from torch import Tensor

from lightning_curvature.linalg import KrylovSpace, VectorSpace, eigenpairs
from lightning_curvature.linalg.prediction import predicted
from tests.oracles.spectra import Operator, with_bulk, with_spectrum

SPECTRA = {
    "gap": [5.0, 3.0],
    "gap of 1 %": [5.0, 4.95, 3.0],
    "cluster": [5.0, 4.99, 4.98, 3.0],
    "negative dominant": [-9.0, 5.0, 4.5],
    "all negative": [],
}
# As in test_eigenpairs.py.
ROUNDING = 1e-12


def _operator(name: str, seed: int) -> Operator:
    values = with_bulk(SPECTRA[name], n=300, seed=seed)
    return with_spectrum(values - 3.0 if name == "all negative" else values, seed=seed)


def _grown(operator: Operator, products: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    krylov = KrylovSpace(operator, operator.space)
    krylov.add(operator.space.random(torch.Generator().manual_seed(seed)))
    for _ in range(products):
        krylov.step()
    return krylov.projected, *krylov.ritz()


@pytest.mark.parametrize("name", SPECTRA)
def test_the_interval_is_the_bound_of_the_source(name: str) -> None:
    """By the matrix itself: the residual of the m outermost Ritz vectors, squared, over the gap to what lies beyond."""
    operator = _operator(name, 0)
    projected, theta, vectors, couplings = _grown(operator, 9, 0)
    _, errors, gap = predicted(projected, theta, couplings, True, 1, torch.inf)
    ahead = projected.clone()
    ahead[-1, -1] = projected[-2, -2]
    beyond = torch.linalg.eigvalsh(ahead).flip(0)[1:10]
    krylov = KrylovSpace(operator, operator.space)
    krylov.add(operator.space.random(torch.Generator().manual_seed(0)))
    for _ in range(9):
        krylov.step()
    v = torch.stack([krylov.basis.combine(column) for column in vectors.T], dim=1)
    residuals = operator.matrix @ v - v * theta
    bounds = []
    for i in range(9):
        ratios = [
            float(residuals[:, : m + 1].square().sum()) / max(float(theta[m] - beyond[m]), 1e-300) for m in range(i, 9)
        ]
        norm = float(residuals[:, i].norm())
        bounds.append((norm * min(norm, *ratios)) ** 0.5)
    assert errors.tolist() == pytest.approx(bounds, rel=1e-8, abs=ROUNDING)
    assert gap == pytest.approx(float((theta[0] - beyond[0]) / theta[0].abs()), rel=1e-9)


# Over 40 searches one in twenty may be off by more; one in ten at the edge of a bulk, where there is no gap.
@pytest.mark.parametrize(("name", "within"), [("gap", 38), ("negative dominant", 38), ("all negative", 36)])
def test_values_are_nearer_than_the_ritz_values_and_within_their_errors(name: str, within: int) -> None:
    covered = better = 0
    for seed in range(40):
        diagonal = with_bulk(SPECTRA[name], n=4000, seed=seed) - 3.0 * (name == "all negative")
        generator = torch.Generator().manual_seed(seed)
        pairs = eigenpairs(lambda v, d=diagonal: d * v, VectorSpace([diagonal]), largest=1, generator=generator)
        assert all(pairs.converged)
        off = abs(float(pairs.values - diagonal.max()))
        covered += off <= float(pairs.errors) + ROUNDING
        better += off <= abs(float(pairs.quotients - diagonal.max())) + ROUNDING
    assert covered >= within
    assert better >= 36


@pytest.mark.parametrize(("name", "width"), [("gap of 1 %", 0.05), ("cluster", 0.02)])
def test_eigenvalues_closer_than_the_residual_count_as_one(name: str, width: float) -> None:
    """The value lies among them; a smaller residual tells them apart."""
    for seed in range(10):
        diagonal = with_bulk(SPECTRA[name], n=4000, seed=seed)
        space, generator = VectorSpace([diagonal]), torch.Generator().manual_seed(seed)
        pairs = eigenpairs(lambda v, d=diagonal: d * v, space, largest=1, generator=generator)
        assert -float(pairs.errors) <= 5.0 - float(pairs.values) <= width + float(pairs.errors)
        apart = eigenpairs(lambda v, d=diagonal: d * v, space, largest=1, residual_tolerance=1e-4, generator=generator)
        assert abs(5.0 - float(apart.values)) <= float(apart.errors)


def test_a_gap_known_from_before_is_kept() -> None:
    operator = _operator("gap", 0)
    projected, theta, _, couplings = _grown(operator, 9, 0)
    _, wide, gap = predicted(projected, theta, couplings, True, 1, torch.inf)
    _, narrow, same = predicted(projected, theta, couplings, True, 1, gap / 10.0)
    assert same == pytest.approx(gap / 10.0, rel=1e-9)
    # Nine products show the second, too: the two outermost bound the first then.
    assert float(wide[0]) <= float(narrow[0])


def test_nothing_rises_in_an_invariant_space() -> None:
    operator = with_spectrum(torch.cat([torch.tensor([3.0, 2.0]), torch.zeros(40)]))
    projected, theta, _, couplings = _grown(operator, 3, 0)
    values, rises, _ = predicted(projected, theta, couplings, True, 1, torch.inf)
    assert float(rises.abs().max()) <= ROUNDING
    assert torch.allclose(values, theta, rtol=0.0, atol=ROUNDING)
