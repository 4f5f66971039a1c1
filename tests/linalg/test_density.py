"""Spectral density: Gauss rules of known vectors, moments, smoothed density, histogram, deflation."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_curvature.linalg import (
    NonFiniteProductError,
    SpectralDensity,
    VectorSpace,
    eigenpairs,
    spectral_density,
)
from tests.oracles.spectra import Operator, with_bulk, with_spectrum

N = 200
VALUES = {
    "outliers and bulk": with_bulk([-10.0, 8.0, 5.0], N),
    "bulk alone": torch.linspace(0.5, 1.5, N, dtype=torch.float64),
    "repeated": torch.tensor([4.0] * 50 + [1.0] * 100 + [-2.0] * 50, dtype=torch.float64),
}
# A moment is a sum of N terms λ^p/N, here of products with a matrix of norm s: off by a few u·s^p·√N; 100 covers it.
EXACT = 100.0 * 2.0**-53


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _density(operator: Operator, **options: Any) -> SpectralDensity:
    return spectral_density(operator, operator.space, **options)


def _quadratic_forms(operator: Operator, starts: int, power: int, seed: int = 0) -> Tensor:
    """Moments vᵀA^p v of the start vectors that the seed gives, one after the other."""
    generator, values = _generator(seed), []
    eigenvalues, vectors = operator.eigh()
    for _ in range(starts):
        v = operator.space.random(generator)
        weights = (vectors.T @ (v / v.norm())).square()
        values.append((weights * eigenvalues**power).sum())
    return torch.stack(values)


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_each_start_is_exact_up_to_twice_its_steps(name: str, steps: int) -> None:
    operator = with_spectrum(VALUES[name])
    density = _density(operator, starts=3, steps=steps, generator=_generator(0))
    size = float(VALUES[name].abs().max())
    for power in range(2 * steps):
        truth = _quadratic_forms(operator, 3, power)
        found = (density.weights * density.nodes**power).sum(dim=1)
        assert torch.allclose(found, truth, rtol=0.0, atol=EXACT * size**power * (1 + power)), power
        assert density.moment(power) == pytest.approx(float(truth.mean()), abs=EXACT * size**power * (1 + power))
        expected = float(truth.std()) / math.sqrt(3.0)
        assert density.moment_error(power) == pytest.approx(expected, abs=EXACT * size**power * (1 + power))
    if name != "repeated":
        # One power more, and the rule is off: the test above can fail.
        power = 2 * steps
        found = (density.weights * density.nodes**power).sum(dim=1)
        assert ((found - _quadratic_forms(operator, 3, power)).abs() > 1e4 * EXACT).all()


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("power", range(5))
def test_moments_within_their_errors(name: str, power: int) -> None:
    density = _density(with_spectrum(VALUES[name]), starts=20, steps=10)
    truth = float((VALUES[name] ** power).mean())
    assert abs(density.moment(power) - truth) <= 4.0 * density.moment_error(power) + 1e-12 * 10.0**power
    # And the errors are no larger than theory has them: Var(vᵀBv) = 2/(N+2)·(mean of λ² − (mean of λ)²), B = A^p, over
    # 20 starts; a scatter of 20 is known to 16 %, more where outliers make it skew. Twice covers it.
    variance = 2.0 / (N + 2) * float((VALUES[name] ** power).var(unbiased=False)) / 20.0
    assert density.moment_error(power) <= 2.0 * math.sqrt(variance) + 1e-12 * 10.0**power


def test_weights_and_counts() -> None:
    operator = with_spectrum(VALUES["outliers and bulk"])
    density = _density(operator, starts=4, steps=12)
    assert density.nodes.shape == density.weights.shape == (4, 12)
    assert density.nodes.dtype == density.weights.dtype == torch.float64
    assert torch.allclose(density.weights.sum(dim=1), torch.ones(4, dtype=torch.float64), rtol=0.0, atol=1e-14)
    assert (density.weights >= 0.0).all()
    assert (density.nodes.diff(dim=1) < 0.0).all()
    assert (density.dimension, density.deflated) == (N, 0)
    assert density.matvecs == operator.products == 48
    assert max(abs(norm - 1.0) for norm in operator.norms) < 1e-14
    assert all(torch.equal(product, kept) for product, kept in operator.returned)


def test_chains_that_end_early() -> None:
    density = _density(with_spectrum(VALUES["repeated"]), starts=3, steps=10)
    # Three different eigenvalues, three products, nothing after them but nodes without weight.
    assert density.matvecs <= 3 * 4
    heavy = density.weights > 1e-10
    assert (heavy.sum(dim=1) == 3).all()
    nodes = density.nodes[heavy].reshape(3, 3)
    assert torch.allclose(nodes, torch.tensor([4.0, 1.0, -2.0], dtype=torch.float64), rtol=0.0, atol=1e-12)
    # Padding adds no new places.
    assert (density.nodes[~heavy] > -2.0 - 1e-9).all()


def test_padding_is_without_weight_and_in_place() -> None:
    calls = [0]
    base = with_spectrum(VALUES["outliers and bulk"])

    def matvec(v: Tensor) -> Tensor:
        calls[0] += 1
        # The first chain ends at once.
        return 3.0 * v if calls[0] == 1 else base(v)

    density = spectral_density(matvec, base.space, starts=2, steps=5)
    assert density.nodes[0] == pytest.approx([3.0] * 5, abs=1e-14)
    assert density.weights[0] == pytest.approx([1.0, 0.0, 0.0, 0.0, 0.0], abs=1e-14)
    assert float(density.weights[1].sum()) == pytest.approx(1.0, abs=1e-14)


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("width", [None, 0.3])
def test_the_smoothed_density_integrates_to_1(name: str, width: float | None) -> None:
    density = _density(with_spectrum(VALUES[name]), starts=2, steps=20)
    grid = density.grid(width)
    values = density.evaluate(grid, width)
    assert (grid.shape, values.shape) == ((1200,), (1200,))
    assert (values >= 0.0).all()
    # Cut off at five widths: 3e-7 at either end at most. The trapezoidal rule is off by 2·exp(−2π²) = 5e-9 where the
    # points lie a width apart, as they do at the finest default.
    assert float(torch.trapezoid(values, grid)) == pytest.approx(1.0, abs=7e-7)


def test_the_smoothed_density_is_that_of_the_eigenvalues() -> None:
    values = VALUES["outliers and bulk"]
    density = _density(with_spectrum(values), starts=30, steps=30)
    width = 0.3
    grid = density.grid(width)
    exact = torch.exp(-0.5 * ((grid[:, None] - values) / width).square()).mean(dim=1) / (width * math.sqrt(2 * math.pi))
    # Var(vᵀf(A)v) ≤ 2/N·E[f²], f the Gaussian, E[f²] ≤ f(0)·E[f]: over 30 starts, in standard deviations.
    deviation = torch.sqrt(2.0 / N / (width * math.sqrt(2 * math.pi)) * exact / 30.0)
    # Five at all of 1200 places, which are about 40 independent ones; 1e-6 where there is nothing.
    assert ((density.evaluate(grid, width) - exact).abs() <= 5.0 * deviation + 1e-6).all()


def test_default_width_shows_no_nodes() -> None:
    # An even bulk of height 1 in (0.5, 1.5), in a space so large that one start is enough.
    n, steps = 20_000, 40
    diagonal = torch.linspace(0.5, 1.5, n, dtype=torch.float64)
    space = VectorSpace([diagonal])
    density = spectral_density(lambda v: diagonal * v, space, starts=1, steps=steps)
    assert density.default_width() == pytest.approx(math.pi / 4.0 / steps, rel=0.02)
    grid = torch.linspace(0.7, 1.3, 100, dtype=torch.float64)
    # Ripples of 1.4 %, and random weights: √(2/(n·2√π·width)) = 3.8 %; the sum of one and three deviations.
    assert ((density.evaluate(grid) - 1.0).abs() < 0.014 + 3 * 0.038).all()
    # One outlier far away leaves the width as it is, as far as a picture of a thousand points can show it.
    diagonal[0] = 15.0
    outlier = spectral_density(lambda v: diagonal * v, space, starts=1, steps=steps)
    assert outlier.default_width() == pytest.approx(math.pi / 4.0 / steps, rel=0.1)
    diagonal[0] = 1000.0
    far = spectral_density(lambda v: diagonal * v, space, starts=1, steps=steps)
    assert far.default_width() == pytest.approx(1.0, rel=0.01)


def test_histogram() -> None:
    density = _density(with_spectrum(VALUES["repeated"]), starts=10, steps=5)
    edges, shares = density.histogram(6)
    assert edges.tolist() == pytest.approx([-2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0], abs=1e-9)
    assert float(shares.sum()) == pytest.approx(1.0, abs=1e-14)
    # A share is known to √(2/N·share·(1 − share)/10) = 1.6 %; three of them. 1.0 lies on an edge.
    assert float(shares[0]) == pytest.approx(0.25, abs=0.048)
    assert float(shares[2] + shares[3]) == pytest.approx(0.5, abs=0.048)
    assert float(shares[5]) == pytest.approx(0.25, abs=0.048)
    assert float(shares[1] + shares[4]) == pytest.approx(0.0, abs=1e-9)


def test_a_node_on_an_edge_belongs_to_the_right() -> None:
    nodes = torch.tensor([[4.0, 2.0, 1.0, 0.0]], dtype=torch.float64)
    weights = torch.tensor([[0.125, 0.25, 0.5, 0.125]], dtype=torch.float64)
    edges, shares = SpectralDensity(nodes, weights, dimension=8, deflated=0, matvecs=4).histogram(4)
    assert edges.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert shares.tolist() == [0.125, 0.5, 0.25, 0.125]


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_one_eigenvalue_alone(value: float) -> None:
    density = spectral_density(lambda v: value * v, VectorSpace([torch.zeros(9, dtype=torch.float64)]))
    assert density.matvecs == 3
    assert density.nodes.flatten().tolist() == pytest.approx([value] * 3, abs=1e-14)
    grid = density.grid()
    assert float(torch.trapezoid(density.evaluate(grid), grid)) == pytest.approx(1.0, abs=7e-7)
    edges, shares = density.histogram(3)
    assert float(edges[0]) < value < float(edges[-1])
    assert shares.tolist() == pytest.approx([0.0, 1.0, 0.0], abs=1e-14)


@pytest.mark.parametrize("converged", [True, False])
def test_deflation_gives_known_eigenvalues_their_weight(converged: bool) -> None:
    operator = with_spectrum(VALUES["outliers and bulk"])
    pairs = eigenpairs(
        operator, operator.space, magnitude=3, max_matvecs=100 if converged else 6, residual_tolerance=1e-6
    )
    assert all(pairs.converged) == converged
    plain = _density(operator, starts=4, steps=12)
    operator.products = 0
    density = _density(operator, starts=4, steps=12, deflation=pairs)
    assert density.matvecs == operator.products == 48
    assert (density.nodes.shape, density.deflated) == ((4, 15), 3)
    assert torch.equal(density.nodes[:, :3], pairs.quotients.expand(4, 3))
    assert torch.equal(density.weights[:, :3], torch.full((4, 3), 1.0 / N, dtype=torch.float64))
    assert torch.allclose(density.weights.sum(dim=1), torch.ones(4, dtype=torch.float64), rtol=0.0, atol=1e-14)
    if converged:
        # The rest is the bulk, in ±1; its moments alone scatter.
        assert float(density.nodes[:, 3:].abs().max()) < 1.0
        for power in (1, 2, 3, 4):
            truth = float((VALUES["outliers and bulk"] ** power).mean())
            # Four starts: Student's t with 3 degrees stays below 5.8 in 99 of 100 cases.
            assert abs(density.moment(power) - truth) < 5.8 * density.moment_error(power)
            # Squares: Var(vᵀA²v) = 2/N·(mean of λ⁴ − …), 14,721/N from the outliers and 1/5 − 1/9 from the bulk:
            # without them the error is a 28th, of higher powers less. Of four starts it is known to a factor of 2.
            assert power == 1 or density.moment_error(power) < 0.2 * plain.moment_error(power)


def test_deflation_counts_a_pair_once() -> None:
    operator = with_spectrum(with_bulk([8.0, -3.0], N))
    density = _density(operator, deflation=eigenpairs(operator, operator.space, largest=1, magnitude=1))
    assert density.deflated == 1


def test_deflation_of_all_but_one() -> None:
    operator = with_spectrum([5.0, 3.0, -1.0])
    density = _density(operator, deflation=eigenpairs(operator, operator.space, largest=2, tolerance=1e-9))
    assert density.nodes.shape == (3, 3)
    assert density.moment(1) == pytest.approx(7.0 / 3.0, abs=1e-14)
    assert density.moment_error(1) < 1e-14
    assert density.default_width() > 0.0


def test_float32() -> None:
    values = VALUES["outliers and bulk"]
    density = _density(with_spectrum(values, dtype=torch.float32), starts=20, steps=10)
    for power in range(4):
        truth = float((values**power).mean())
        # Rounding: u32 in place of u64 in EXACT.
        assert abs(density.moment(power) - truth) <= 4.0 * density.moment_error(power) + 100 * 2.0**-24 * 10.0**power


def test_one_start_knows_no_error() -> None:
    assert math.isnan(_density(with_spectrum(VALUES["bulk alone"]), starts=1, steps=3).moment_error(1))


def test_same_bits_twice() -> None:
    operator = with_spectrum(VALUES["bulk alone"])
    state = torch.get_rng_state()
    one, two = _density(operator, steps=8), _density(operator, steps=8)
    assert torch.equal(one.nodes, two.nodes)
    assert torch.equal(one.weights, two.weights)
    assert not torch.equal(one.nodes[0], one.nodes[1])
    assert torch.equal(torch.get_rng_state(), state)


def test_a_product_that_is_not_finite() -> None:
    operator = with_spectrum(VALUES["bulk alone"])
    with pytest.raises(NonFiniteProductError, match="got NaN or infinity in product 1"):
        spectral_density(lambda v: operator(v) * math.nan, operator.space)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda d: spectral_density(torch.clone, VectorSpace([torch.zeros(3)]), starts=0),
            "starts must be a whole number of at least 1, got 0",
        ),
        (
            lambda d: spectral_density(torch.clone, VectorSpace([torch.zeros(3)]), steps=0),
            "steps must be a whole number of at least 1, got 0: 30 make",
        ),
        (lambda d: d.moment(-1), r"^power must be a whole number of at least 0, got -1: 1 gives the trace over N\.$"),
        (
            lambda d: d.evaluate(d.grid(), width=0.0),
            r"^width must be positive and finite, or None, got 0\.0: leave it out for what the ",
        ),
        (lambda d: d.grid(width=math.inf), r"^width must be positive and finite, or None, got inf"),
        (lambda d: d.histogram(0), r"^bins must be a whole number of at least 1, got 0: 100 make a good picture\.$"),
    ],
)
def test_bad_arguments(call: Any, sentence: str) -> None:
    density = spectral_density(torch.clone, VectorSpace([torch.zeros(3)]))
    with pytest.raises(ValueError, match=sentence):
        call(density)
