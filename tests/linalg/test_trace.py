"""Traces: within their standard errors, unbiased, at the products they say."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_curvature.linalg import KrylovSpace, NonFiniteProductError, VectorSpace, eigenpairs, trace
from lightning_curvature.linalg.samples import TraceSamples
from tests.oracles.spectra import Operator, with_bulk, with_spectrum

N = 150
OUTLIERS = [50.0, 30.0, 22.0, 18.0, 15.0, 12.0, 9.0]


def _positive(seed: int = 1) -> Tensor:
    """Outliers, and a bulk near zero with a long tail."""
    bulk = torch.randn(N - len(OUTLIERS), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.cat([torch.tensor(OUTLIERS, dtype=torch.float64), (1.5 * bulk - 2.0).exp()])


def _cancelling() -> Tensor:
    """Indefinite, with a trace that is a small difference of large sums."""
    values = with_bulk([-10.0, 5.0, 4.0, 3.0, -3.0], N)
    return values - values.mean() + 0.01


SPECTRA = {
    "outliers and bulk": with_spectrum(_positive()),
    "cancelling": with_spectrum(_cancelling()),
    "bulk alone": with_spectrum(torch.linspace(0.0, 1.0, N, dtype=torch.float64)),
    "power law": with_spectrum(1.0 / torch.arange(1, N + 1, dtype=torch.float64)),
    "low rank": with_spectrum([5.0, -4.0, 3.0, 2.0] + [0.0] * (N - 4)),
    "more rank than sketch": with_spectrum([3.0] * 8 + [float(i) for i in range(1, 13)] + [0.0] * (N - 20)),
    "diagonal": Operator(torch.diag(_positive())),
}


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("sketch", [0, 5, 10])
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.thinned(14)
def test_three_standard_errors_hold_in_99_of_100_seeds(name: str, sketch: int) -> None:
    operator = SPECTRA[name]
    truth = float(operator.matrix.trace())
    # 150 products of norm 50 at most are summed: rounding of 150·50·u·√150 = 1e-11 at most.
    outside = 0
    for seed in range(100):
        found = trace(operator, operator.space, sketch=sketch, max_matvecs=40, generator=_generator(seed))
        outside += abs(found.value - truth) > 3.0 * found.standard_error + 1e-11
        assert found.converged == (found.standard_error <= 0.05 * abs(found.value))
    assert outside <= 1


@pytest.mark.parametrize("name", ["outliers and bulk", "cancelling", "power law", "bulk alone"])
@pytest.mark.thinned(4)
def test_unbiased_and_the_standard_error_is_the_scatter(name: str) -> None:
    operator, runs = SPECTRA[name], 300
    found = [
        trace(operator, operator.space, sketch=5, max_matvecs=12, relative_error=1e-9, generator=_generator(seed))
        for seed in range(runs)
    ]
    errors = torch.tensor([f.value for f in found], dtype=torch.float64) - operator.matrix.trace()
    # Four standard errors of a mean over 300 runs.
    assert abs(float(errors.mean())) < 4.0 * float(errors.std()) / runs**0.5
    # A standard deviation from 300 runs is known to 1/√600 = 4 % for a normal law; the law's excess kurtosis, 12/7 for
    # 7 samples of a remainder of one eigenvalue, makes it 5.6 %. Three of them.
    ratio = math.sqrt(sum(f.standard_error**2 for f in found) / runs) / float(errors.square().mean().sqrt())
    assert ratio > 0.83
    if name == "bulk alone":
        # k = 83: eleven samples and more do not raise it by 1 %.
        assert ratio < 1.18


@pytest.mark.parametrize("sketch", [0, 5])
@pytest.mark.parametrize("converged", [True, False])
@pytest.mark.thinned(3)
def test_deflation_makes_the_error_smaller_and_costs_nothing(sketch: int, converged: bool) -> None:
    operator = SPECTRA["outliers and bulk"]
    # Vectors that are orthonormal with their Rayleigh quotients are all that is needed; converged ones take out more.
    pairs = eigenpairs(operator, operator.space, largest=4, max_matvecs=100 if converged else 8)
    assert all(pairs.converged) == converged
    options: dict[str, Any] = {"sketch": sketch, "max_matvecs": sketch + 6, "relative_error": 1e-9}
    truth, errors, plain = float(operator.matrix.trace()), [], []
    for seed in range(100):
        operator.products = 0
        found = trace(operator, operator.space, deflation=pairs, generator=_generator(seed), **options)
        assert found.matvecs == operator.products == sketch + 6
        assert 4 <= found.deflated <= sketch + 4
        errors.append(found.value - truth)
        plain.append(trace(operator, operator.space, generator=_generator(seed), **options).value - truth)
    deflated, without = (torch.tensor(e, dtype=torch.float64) for e in (errors, plain))
    # In theory by factors of 1.6 to 2.9 here; scatters over 100 seeds are known to a tenth.
    assert float(deflated.square().mean().sqrt()) < 0.8 * float(without.square().mean().sqrt())
    assert abs(float(deflated.mean())) < 4.0 * float(deflated.std()) / 10.0


def test_what_the_operator_moves_into_the_known_subspace_is_no_error() -> None:
    # u = (v₁ + v₂)/√2 of the eigenvalues ±50 is far from any eigenvector: A moves the rest of their plane onto u, and
    # leaves nothing of it in the remainder, whose share is then the bulk's alone.
    operator = with_spectrum(with_bulk([50.0, -50.0], N))
    values, vectors = operator.eigh()
    u = (vectors[:, 0] + vectors[:, -1]) / 2.0**0.5
    pair = replace(eigenpairs(operator, operator.space, largest=1), values=torch.zeros(1).double(), vectors=[u])
    found = trace(operator, operator.space, deflation=pair, sketch=0, max_matvecs=20, relative_error=1e-9)
    # 2·‖B‖² over 20 samples; it is known from 20·148 squares.
    expected = (2.0 * float(values[1:-1].square().sum()) / 20.0) ** 0.5
    assert found.standard_error == pytest.approx(expected, rel=0.1)


def test_a_pair_that_is_given_twice_counts_once() -> None:
    operator = SPECTRA["outliers and bulk"]
    once = eigenpairs(operator, operator.space, largest=1)
    twice = eigenpairs(operator, operator.space, largest=1, magnitude=1)
    one, two = (trace(operator, operator.space, deflation=pairs) for pairs in (once, twice))
    assert one.deflated == two.deflated
    # Rounding of another order: as in the first test.
    assert two.value == pytest.approx(one.value, abs=1e-11)


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_rank_below_the_sketch_is_exact_after_three_samples(rank: int) -> None:
    operator = with_spectrum([float(i) for i in range(1, rank + 1)] + [0.0] * (N - rank))
    found = trace(operator, operator.space, relative_error=1e-6)
    # The chain holds the rank and one vector of the null space, or another one where rounding just passes for a
    # remainder; the samples show that nothing is left.
    assert found.deflated in (rank + 1, rank + 2)
    assert (found.samples, found.matvecs) == (3, found.deflated + 3)
    assert found.value == pytest.approx(rank * (rank + 1) / 2, rel=1e-12)  # as in the first test
    assert found.standard_error < 1e-12 * found.value
    assert found.converged


def test_zero_operator() -> None:
    found = trace(torch.zeros_like, VectorSpace([torch.zeros(N)]))
    assert (found.value, found.standard_error, found.samples, found.converged) == (0.0, 0.0, 1, True)


@pytest.mark.parametrize("n", [1, 2, 5, 10])
def test_small_spaces_are_exact(n: int) -> None:
    operator = with_spectrum(torch.linspace(-1.0, 3.0, n, dtype=torch.float64))
    found = trace(operator, operator.space)
    assert (found.samples, found.matvecs, found.deflated) == (0, n, n)
    assert found.value == pytest.approx(float(operator.matrix.trace()), abs=1e-14)  # ten roundings of 3u
    assert (found.standard_error, found.converged) == (0.0, True)


def test_a_multiple_of_the_identity_has_no_error() -> None:
    found = trace(lambda v: -2.0 * v, VectorSpace([torch.zeros(N, dtype=torch.float64)]))
    assert found.value == pytest.approx(-2.0 * N, rel=1e-14)
    # ‖Bw‖² − (wᵀBw)² is a rounding of 4, so that its root is 4e-8 at most, and the error 150·√(2/152/3) of that. All
    # products have random directions: k = 150 and 60/(9·150) leave it there.
    assert found.standard_error < 5e-7
    assert (found.matvecs, found.deflated) == (3, 0)


def test_more_samples_until_the_error_is_small_enough() -> None:
    operator = SPECTRA["bulk alone"]
    loose, tight = (trace(operator, operator.space, sketch=0, relative_error=e, max_matvecs=500) for e in (0.05, 0.01))
    assert loose.converged
    assert tight.converged
    # Var = 2(‖A‖² − tr²/N)·N/(N+2) = 25.0 with tr = 75: (5.0/0.75)² = 44 samples; the variance is known to some
    # percent.
    assert 40 <= tight.samples <= 49
    assert loose.samples == 3
    assert tight.matvecs == tight.samples


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "products", "deflated"),
    [
        ("bulk alone", 3, 0),
        pytest.param("one outlier", 8, 2, marks=SLOW),
        pytest.param("power law", 16, 3, marks=SLOW),
    ],
)
def test_two_standard_errors_hold_in_nine_of_ten_seeds(name: str, products: float, deflated: float) -> None:
    """At the products that are needed: three for many similar eigenvalues, few more where one of them dominates."""
    operator = SPECTRA.get(name, with_spectrum([75.0] + [0.01] * (N - 1)))
    found = [trace(operator, operator.space, generator=_generator(seed)) for seed in range(200)]
    truth = float(operator.matrix.trace())
    assert sum(f.matvecs for f in found) <= products * len(found)
    assert sum(f.deflated for f in found) >= deflated * len(found)
    # Rounding: as in the first test.
    assert sum(abs(f.value - truth) <= 2.0 * f.standard_error + 1e-11 for f in found) >= 180
    assert all(f.converged for f in found)


def test_samples_follow_the_basis() -> None:
    """As if they had been drawn when it was known: orthogonal unit vectors with their products, none made anew."""
    operator = with_spectrum(_positive())
    krylov = KrylovSpace(operator, operator.space)
    samples = TraceSamples(krylov, 2)
    generator = _generator(0)
    for _ in range(3):
        samples.draw(generator)
    krylov.add(operator.space.random(generator))
    for row in range(1, 6):
        krylov.step()
        samples.follow()
        basis = torch.stack([krylov.basis[i] for i in range(row)])
        rest = torch.eye(N, dtype=torch.float64) - basis.T @ basis
        forms = []
        for sample in samples.kept:
            # Products of norm 50 at most, a few roundings of each in five steps.
            assert torch.allclose(sample.product, operator.matrix @ sample.vector, rtol=0.0, atol=1e-12)
            assert torch.allclose(sample.remainder, rest @ sample.product, rtol=0.0, atol=1e-12)
            assert float((basis @ sample.vector).abs().max()) < 1e-14
            assert float(sample.vector.norm()) == pytest.approx(1.0, abs=1e-14)
            forms.append(float(sample.vector @ operator.matrix @ sample.vector))
        known = float((basis @ operator.matrix @ basis.T).trace())
        assert samples.count == 2
        assert samples.estimate()[0] == pytest.approx(known + (N - row) * sum(forms) / 2, rel=1e-12)
    assert operator.products == krylov.matvecs == 8


def test_the_cap_is_kept_and_said() -> None:
    operator = SPECTRA["cancelling"]
    operator.products = 0
    found = trace(operator, operator.space, max_matvecs=23)
    assert not found.converged
    assert found.matvecs == operator.products == 23
    # Products follow the outliers; the basis ends where as many as are left would not follow the rest.
    assert 2 <= found.deflated <= 10
    # Samples that were too many to be kept do not follow it.
    assert 3 <= found.samples <= 23 - found.deflated


def test_float32() -> None:
    operator = with_spectrum(_positive(), dtype=torch.float32)
    found = trace(operator, operator.space)
    assert found.converged
    # Rounding, 150·50·u·√150 = 6e-3, is a tenth of a percent of the error allowed.
    assert abs(found.value - float(_positive().sum())) < 3.0 * found.standard_error + 6e-3


def test_same_bits_twice_and_only_from_the_generator() -> None:
    operator = SPECTRA["power law"]
    state = torch.get_rng_state()
    assert trace(operator, operator.space) == trace(operator, operator.space)
    assert trace(operator, operator.space) != trace(operator, operator.space, generator=_generator(1))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_operator_gets_unit_vectors_and_keeps_its_products() -> None:
    operator = with_spectrum(_positive())
    trace(operator, operator.space)
    # n roundings of the squares, a random walk: √150·u = 1e-15.
    assert max(abs(norm - 1.0) for norm in operator.norms) < 1e-14
    assert all(torch.equal(product, kept) for product, kept in operator.returned)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", [1, 10, 11, 14])
def test_a_product_that_is_not_finite(bad: float, at: int) -> None:
    operator = with_spectrum(_positive())

    def matvec(v: Tensor) -> Tensor:
        product = operator(v)
        return product.fill_(bad) if operator.products == at else product

    with pytest.raises(NonFiniteProductError, match=f"got NaN or infinity in product {at}: look at the loss"):
        trace(matvec, operator.space, relative_error=1e-6)
    assert operator.products == at


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"relative_error": 0.0}, r"relative_error must lie between 0 and 1, got 0\.0: 0\.05 gives the trace to 5 %\."),
        ({"relative_error": math.nan}, r"relative_error must lie between 0 and 1, got nan: .*"),
        ({"min_samples": 0}, r"min_samples must be a whole number of at least 1, got 0: leave it at 3\."),
        ({"sketch": -1}, r"sketch must be a whole number of at least 0, got -1: 0 makes no sketch\."),
        ({"max_matvecs": 2}, r"max_matvecs must be a whole number of at least 3, got 2: allow 100\."),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        trace(lambda v: 2.0 * v, VectorSpace([torch.zeros(6)]), **arguments)


@pytest.mark.parametrize(("dimension", "relative_error"), [(26, 0.05), (26, 0.01), (94, 0.01)])
def test_exact_where_samples_would_take_more_products_than_are_left(dimension: int, relative_error: float) -> None:
    """Cubes of normal numbers: a heavy tail of both signs, whose trace is small against its entries."""
    exact = 0
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        diagonal = torch.randn(dimension, generator=g, dtype=torch.float64) ** 3
        found = trace(lambda v, d=diagonal: d * v, VectorSpace([diagonal]), relative_error=relative_error, generator=g)
        assert found.converged
        assert found.matvecs <= 100
        expected = float(diagonal.sum())
        # Rounding: a sum of N entries up to 30, each with a few units of 1e-16 in N steps.
        rounding = 1e-15 * dimension * float(diagonal.abs().sum())
        assert abs(found.value - expected) <= 3.0 * found.standard_error + rounding
        if found.standard_error == 0.0:
            exact += 1
            assert (found.deflated, found.matvecs) == (dimension, dimension + found.samples)
    assert exact


def test_not_exact_where_products_do_not_suffice() -> None:
    g = torch.Generator().manual_seed(0)
    diagonal = torch.randn(99, generator=g, dtype=torch.float64) ** 3
    found = trace(lambda v: diagonal * v, VectorSpace([diagonal]), relative_error=0.01, max_matvecs=100)
    assert (found.converged, found.matvecs) == (False, 100)


SIZES, LABELS = [50, 60, 40], [0, 1, 0]


@pytest.mark.parametrize("deflated", [0, 3])
@pytest.mark.parametrize("name", ["outliers and bulk", "cancelling", "bulk alone", "power law", "low rank"])
@pytest.mark.thinned(3)
def test_traces_of_blocks(name: str, deflated: int) -> None:
    """Within two of their errors in nine of ten seeds, also beside eigenvectors that have not converged."""
    matrix = SPECTRA[name].matrix
    space = VectorSpace([torch.zeros(size, dtype=torch.float64) for size in SIZES])
    truth = torch.stack([matrix.diagonal()[:50].sum() + matrix.diagonal()[110:].sum(), matrix.diagonal()[50:110].sum()])
    pairs, found, seeds = None, [], 60
    if deflated:
        pairs = eigenpairs(lambda v: matrix @ v, space, largest=deflated, max_matvecs=5, generator=_generator(999))
    for seed in range(seeds):
        options: dict[str, Any] = {"deflation": pairs, "max_matvecs": 40, "generator": _generator(seed)}
        one = trace(lambda v: matrix @ v, space, blocks=LABELS, **options)
        plain = trace(lambda v: matrix @ v, space, **(options | {"generator": _generator(seed)}))
        assert (one.value, one.standard_error, one.matvecs) == (plain.value, plain.standard_error, plain.matvecs)
        assert one.blocks is not None
        assert one.block_errors is not None
        # Sums of some thousand products of numbers of the matrix's size, with roundings of 1e-16.
        assert float(one.blocks.sum()) == pytest.approx(one.value, rel=0.0, abs=1e-11 * float(matrix.abs().max()) * N)
        found.append((one.blocks, one.block_errors))
    blocks, errors = (torch.stack(column) for column in zip(*found, strict=True))
    off = blocks - truth
    rounding = 1e-11 * float(matrix.abs().max()) * N
    assert ((off.abs() <= 2.0 * errors + rounding).double().mean(0) >= 0.9).all()
    # Errors are no mere bounds: without vectors that have not converged they have the size of the scatter.
    scatter = off.square().mean(0).sqrt()
    assert deflated or (errors.square().mean(0).sqrt() <= 3.0 * scatter + rounding).all()


@pytest.mark.parametrize("name", ["outliers and bulk", "cancelling", "power law"])
def test_traces_of_blocks_are_unbiased(name: str) -> None:
    """Of six samples, however they come out, beside three vectors that are no eigenvectors."""
    matrix, found, seeds = SPECTRA[name].matrix, [], 200
    space = VectorSpace([torch.zeros(size, dtype=torch.float64) for size in SIZES])
    pairs = eigenpairs(lambda v: matrix @ v, space, largest=3, max_matvecs=4, generator=_generator(999))
    for seed in range(seeds):
        options: dict[str, Any] = {"deflation": pairs, "max_matvecs": 6, "sketch": 0, "relative_error": 1e-9}
        one = trace(lambda v: matrix @ v, space, blocks=LABELS, generator=_generator(seed), **options)
        assert one.samples == 6
        found.append(one.blocks)
    blocks = torch.stack(found)  # type: ignore[arg-type]
    truth = torch.stack([matrix.diagonal()[:50].sum() + matrix.diagonal()[110:].sum(), matrix.diagonal()[50:110].sum()])
    # The mean over the seeds is off by more than four of its standard deviations in one case of 16,000.
    assert ((blocks.mean(0) - truth).abs() <= 4.0 * blocks.std(0) / seeds**0.5).all()


def test_traces_of_blocks_are_exact_where_all_is_deflated() -> None:
    matrix = with_spectrum([4.0, -3.0, 2.0, 1.0, 0.5, -0.25]).matrix
    space = VectorSpace([torch.zeros(2, dtype=torch.float64) for _ in range(3)])
    found = trace(lambda v: matrix @ v, space, blocks=[1, 0, 1])
    assert found.blocks is not None
    assert found.block_errors is not None
    pieces = matrix.diagonal().split(2)
    truth = torch.stack([pieces[1].sum(), pieces[0].sum() + pieces[2].sum()])
    torch.testing.assert_close(found.blocks, truth, rtol=0.0, atol=1e-13)
    assert found.block_errors.tolist() == [0.0, 0.0]


def test_blocks_are_one_for_each_tensor() -> None:
    space = VectorSpace([torch.zeros(2), torch.zeros(1)])
    with pytest.raises(ValueError, match="blocks must hold one for each tensor, got 1 for 2: leave none out"):
        trace(lambda v: v.clone(), space, blocks=[0])
