"""Extreme eigenpairs against the dense eigendecomposition in float64."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lightning_curvature.linalg import Eigenpairs, eigenpairs
from lightning_curvature.linalg.basis import Basis
from tests.oracles.spectra import Operator, with_bulk, with_spectrum

# The peer's trap: the dominant eigenvalue is negative.
NEGATIVE = [-10.0, 5.0, 3.0, 2.0]
# Products of unit vectors with a 120 × 120 matrix of norm 10 are off by about √120·u·10 = 1e-14 in float64; a few of
# them add up in a residual.
ROUNDING = 1e-12


def _true_residuals(operator: Operator, pairs: Eigenpairs) -> Tensor:
    matrix = operator.matrix.double()
    rows = zip(pairs.quotients, pairs.vectors, strict=True)
    return torch.stack([(matrix @ v.double() - value * v.double()).norm() for value, v in rows])


def _true_quotients(operator: Operator, pairs: Eigenpairs) -> Tensor:
    return torch.stack([v.double() @ (operator.matrix.double() @ v.double()) for v in pairs.vectors])


def _check(operator: Operator, pairs: Eigenpairs, expected: Sequence[float], tolerance: float = 1e-3) -> None:
    """Values within the reported errors of the expected ones, which are below the tolerance; residuals as reported."""
    truth = torch.tensor(expected, dtype=torch.float64)
    assert all(pairs.converged)
    assert ((pairs.values - truth).abs() <= pairs.errors + ROUNDING).all(), (pairs.values, truth)
    assert torch.allclose(pairs.residuals, _true_residuals(operator, pairs), rtol=1e-6, atol=ROUNDING)
    assert (pairs.errors <= tolerance * pairs.values.abs() + ROUNDING).all()
    assert torch.allclose(pairs.quotients, _true_quotients(operator, pairs), rtol=0.0, atol=ROUNDING)
    gram = torch.stack([torch.stack([a @ b for a in pairs.vectors]) for b in pairs.vectors])
    assert torch.allclose(gram, torch.eye(len(gram), dtype=gram.dtype), rtol=0.0, atol=ROUNDING)
    assert pairs.matvecs == operator.products


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"largest": 1}, [5.0]),
        ({"largest": 3}, [5.0, 3.0, 2.0]),
        ({"smallest": 1}, [-10.0]),
        ({"magnitude": 1}, [-10.0]),
        ({"magnitude": 4}, [-10.0, 5.0, 3.0, 2.0]),
        ({"largest": 2, "smallest": 1}, [5.0, 3.0, -10.0]),
    ],
    ids=str,
)
@pytest.mark.parametrize("block_size", [None, 1, 5])
def test_negative_dominant_curvature(asked: dict[str, int], expected: list[float], block_size: int | None) -> None:
    operator = with_spectrum(with_bulk(NEGATIVE))
    pairs = eigenpairs(operator, operator.space, block_size=block_size, **asked)
    _check(operator, pairs, expected)
    assert len(pairs.vectors) == len(expected)


def test_the_mirrored_operator_takes_the_same_products() -> None:
    operator = with_spectrum(with_bulk(NEGATIVE))
    mirrored = Operator(-operator.matrix)
    largest = eigenpairs(operator, operator.space, largest=2)
    smallest = eigenpairs(mirrored, operator.space, smallest=2)
    assert torch.allclose(smallest.values, -largest.values, rtol=0.0, atol=ROUNDING)
    assert smallest.matvecs == largest.matvecs


def test_both_orders_of_one_pair() -> None:
    operator = with_spectrum(with_bulk([6.0, -4.0]))
    pairs = eigenpairs(operator, operator.space, largest=1, magnitude=2)
    # The largest by magnitude is the largest: the same vector twice.
    assert torch.equal(pairs.values[0], pairs.values[1])
    assert torch.equal(pairs.vectors[0], pairs.vectors[1])
    assert abs(float(pairs.values[2]) + 4.0) <= float(pairs.errors[2])


def test_tight_tolerance_gives_all_digits() -> None:
    operator = with_spectrum(with_bulk(NEGATIVE))
    pairs = eigenpairs(operator, operator.space, largest=2, smallest=1, tolerance=1e-10)
    _check(operator, pairs, [5.0, 3.0, -10.0], tolerance=1e-10)
    # The error is the square of the residual over the gap, 1e-18: rounding is all that is left.
    assert torch.allclose(pairs.values, torch.tensor([5.0, 3.0, -10.0], dtype=torch.float64), rtol=0.0, atol=ROUNDING)


def test_vectors_are_the_eigenvectors() -> None:
    operator = with_spectrum(with_bulk(NEGATIVE))
    pairs = eigenpairs(operator, operator.space, largest=2, residual_tolerance=1e-6)
    _, vectors = operator.eigh()
    for i, v in enumerate(pairs.vectors):
        # sin of the angle ≤ residual / gap ≤ 5e-6 / 1; its square is what the cosine misses.
        assert 1.0 - abs(float(v @ vectors[:, i])) < 1e-11


@pytest.mark.parametrize("outliers", [[5.0, 4.999, 4.99], [5.0, 5.0, 5.0, 3.0]], ids=["clustered", "repeated"])
def test_clusters_with_a_block_of_their_size(outliers: list[float]) -> None:
    operator = with_spectrum(with_bulk(outliers))
    k = len(outliers)
    # The cluster is told apart only by residuals below its gaps.
    pairs = eigenpairs(operator, operator.space, largest=k, tolerance=1e-5)
    _check(operator, pairs, outliers, tolerance=1e-5)
    # An eigenvalue counted twice or missed would be 1e-3 off, or 2.
    assert torch.allclose(pairs.values, torch.tensor(outliers, dtype=torch.float64), rtol=0.0, atol=1e-4)


def test_one_start_vector_finds_one_copy_of_a_repeated_eigenvalue() -> None:
    operator = with_spectrum(with_bulk([5.0, 5.0, 5.0, 3.0]))
    pairs = eigenpairs(operator, operator.space, largest=2, block_size=1, tolerance=1e-6)
    _check(operator, pairs, [5.0, 3.0], tolerance=1e-6)


def _record_memory(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of memory that bases have taken, after each row."""
    rows: list[int] = []
    append = Basis.append

    def recorded(basis: Basis, vector: Tensor) -> None:
        append(basis, vector)
        rows.append(sum(len(block) for block in basis._blocks))

    monkeypatch.setattr(Basis, "append", recorded)
    return rows


@pytest.mark.parametrize(
    ("asked", "expected", "max_basis"),
    [
        ({"largest": 1}, [1.5], 8),
        ({"smallest": 1}, [-1.4], 8),
        ({"largest": 2, "smallest": 2}, [1.5, 1.3, -1.4, -1.2], 16),
        ({"magnitude": 4}, [1.5, -1.4, 1.3, -1.2], 24),
    ],
    ids=str,
)
def test_restarts_give_the_same_in_bounded_memory(
    asked: dict[str, int], expected: list[float], max_basis: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Gaps of a tenth of the bulk's width: slow.
    operator = with_spectrum(with_bulk([1.5, -1.4, 1.3, -1.2], n=300))
    rows = _record_memory(monkeypatch)
    pairs = eigenpairs(operator, operator.space, max_basis=max_basis, max_matvecs=600, residual_tolerance=1e-6, **asked)
    _check(operator, pairs, expected, tolerance=1e-6)
    assert torch.allclose(pairs.values, torch.tensor(expected, dtype=torch.float64), rtol=0.0, atol=1e-9)
    assert pairs.iterations > 2
    assert max(rows) <= max_basis


def test_a_block_beyond_the_basis_makes_it_larger_and_ends() -> None:
    # 40 start vectors in a basis of 8: a restart that leaves no room would go on for ever.
    operator = with_spectrum(with_bulk([3.0], n=300))
    generator = torch.Generator().manual_seed(0)
    start = [operator.space.random(generator) for _ in range(40)]
    pairs = eigenpairs(operator, operator.space, largest=1, start=start, max_basis=8, max_matvecs=400)
    _check(operator, pairs, [3.0])
    operator.products = 0
    pairs = eigenpairs(operator, operator.space, largest=1, start=start, max_basis=64, max_matvecs=400)
    _check(operator, pairs, [3.0])
    # A restart keeps half of the 24 vectors beside the block, so that 12 products lie between two of them.
    assert pairs.iterations <= 1 + pairs.matvecs // 12


def test_more_start_vectors_than_products() -> None:
    operator = with_spectrum(with_bulk([3.0]))
    generator = torch.Generator().manual_seed(0)
    start = [operator.space.random(generator) for _ in range(40)]
    assert eigenpairs(operator, operator.space, largest=1, start=start, max_matvecs=10).matvecs == 10


@pytest.mark.parametrize("k", [1, 3])
def test_going_on_from_the_pairs_themselves_takes_a_product_each(k: int) -> None:
    operator = with_spectrum(with_bulk([9.0, 7.0, 5.0]))
    before = eigenpairs(operator, operator.space, largest=k, smallest=1, residual_tolerance=1e-6)
    operator.products = 0
    pairs = eigenpairs(operator, operator.space, largest=k, smallest=1, before=before)
    assert pairs.matvecs == k + 1
    assert pairs.upper == -pairs.lower == math.inf
    _check(operator, pairs, [*[9.0, 7.0, 5.0][:k], float(operator.eigh()[0][-1])])


def test_going_on_from_a_neighbour_is_cheaper() -> None:
    before = with_spectrum(with_bulk([3.0, 2.5], n=300))
    # The neighbour: outliers moved by 2 %, all vectors turned by about a hundredth.
    noise = torch.randn(300, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) / 300**0.5
    turn = torch.matrix_exp(0.01 * (noise - noise.T))
    values, q = before.eigh()
    values[:2] = torch.tensor([3.05, 2.45])
    after = Operator(turn @ (q * values) @ q.T @ turn.T)
    known = eigenpairs(before, before.space, largest=2)
    cold = eigenpairs(after, after.space, largest=2)
    after.products = 0
    warm = eigenpairs(after, after.space, largest=2, before=known)
    _check(after, warm, [3.05, 2.45])
    assert warm.matvecs < 0.5 * cold.matvecs
    assert warm.gaps[0] <= known.gaps[0]


def test_a_neighbour_that_the_first_product_does_not_show_is_known_from_before() -> None:
    """1 % apart: by its residual alone, over the distance to the mean of the rest, the value would be told too well."""
    operator = with_spectrum(with_bulk([5.0, 4.95], n=300))
    before = eigenpairs(operator, operator.space, largest=1, residual_tolerance=1e-4)
    # Within a factor of two of the gap: from above, as far as the second has been found.
    assert 0.01 - 1e-4 <= before.gaps[0] < 0.02
    _, vectors = operator.eigh()
    turned = replace(before, vectors=[vectors[:, 0] + 0.02 * vectors[:, 1]])
    pairs = eigenpairs(operator, operator.space, largest=1, tolerance=1e-2, before=turned)
    assert pairs.matvecs == 1
    # 5 − 0.02² · 0.05, with a residual of 1e-3.
    assert float(pairs.quotients) == pytest.approx(5.0 - 2e-5, abs=1e-8)
    assert 5.0 - float(pairs.values) <= float(pairs.errors)
    forgotten = eigenpairs(operator, operator.space, largest=1, tolerance=1e-2, before=replace(turned, gaps=(1.0, 1.0)))
    assert 5.0 - float(forgotten.quotients) > float(forgotten.errors)


def test_same_bits_twice() -> None:
    operator = with_spectrum(with_bulk(NEGATIVE))
    one, two = (eigenpairs(operator, operator.space, largest=2, smallest=1, max_basis=12) for _ in range(2))
    assert torch.equal(one.values, two.values)
    assert torch.equal(one.residuals, two.residuals)
    assert torch.equal(torch.stack(one.vectors), torch.stack(two.vectors))


def test_generator_is_the_only_source_of_randomness() -> None:
    operator = with_spectrum(with_bulk(NEGATIVE))
    state = torch.get_rng_state()
    seeds = [
        eigenpairs(operator, operator.space, largest=1, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)
    ]
    assert torch.equal(seeds[0].vectors[0], seeds[1].vectors[0])
    assert not torch.equal(seeds[0].vectors[0], seeds[2].vectors[0])
    assert torch.equal(torch.get_rng_state(), state)


def test_the_operator_gets_unit_vectors_and_keeps_its_products() -> None:
    operator = with_spectrum(with_bulk(NEGATIVE))
    eigenpairs(operator, operator.space, largest=2, smallest=1, max_basis=10)
    assert max(abs(norm - 1.0) for norm in operator.norms) < ROUNDING
    assert all(torch.equal(product, kept) for product, kept in operator.returned)


def test_float32() -> None:
    operator = with_spectrum(with_bulk(NEGATIVE), dtype=torch.float32)
    pairs = eigenpairs(operator, operator.space, largest=3, smallest=1)
    truth = torch.tensor([5.0, 3.0, 2.0, -10.0], dtype=torch.float64)
    # float32 products of norm 10 are off by √120·u·10 = 7e-6; residuals of 1e-3 leave 1e-6·|λ|²/gap of a value.
    assert all(pairs.converged)
    assert ((pairs.values - truth).abs() <= pairs.errors + 7e-6).all()
    assert torch.allclose(pairs.residuals, _true_residuals(operator, pairs), rtol=0.01, atol=5e-5)
    assert {v.dtype for v in pairs.vectors} == {torch.float32}
    assert pairs.values.dtype == torch.float64


def test_float32_at_a_tolerance_beyond_its_digits() -> None:
    operator = with_spectrum(with_bulk(NEGATIVE), dtype=torch.float32)
    pairs = eigenpairs(operator, operator.space, largest=1, tolerance=1e-12, max_matvecs=119)
    assert pairs.converged == (True,)
    assert float(pairs.values[0]) == pytest.approx(5.0, abs=2e-5)  # as above, a few times over
