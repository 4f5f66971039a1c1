"""Activity–weight duality: its two terms, and the chain of approximations by loops."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_curvature.functional.noise import (
    CHAIN,
    DualitySums,
    DualityTerms,
    duality_terms,
    noise_covariance,
)
from tests.oracles.noise import (
    Pairs,
    Samples,
    duality_of,
    layer_derivatives,
    nearest_of_class,
    samples_of,
    two_terms,
)

# Of the largest entry: float64 sums of some hundred products.
SAME = 1e-11


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_same(found: Tensor, expected: Tensor) -> None:
    largest = float(expected.abs().max())
    assert largest > 0.0
    torch.testing.assert_close(found, expected, rtol=0.0, atol=SAME * largest)


class Case:
    """A weight (5, 4) between two nonlinear layers, and all there is to know of 18 samples of three classes."""

    def __init__(self, name: str = "2.weight") -> None:
        torch.manual_seed(1)
        self.network = nn.Sequential(
            nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3)
        ).double()
        self.name, self.x, self.y = name, random(18, 6), torch.arange(18) % 3
        self.weight = self.network.get_parameter(name).detach()
        self.samples: Samples = samples_of(self.network, F.cross_entropy, name, self.x, self.y)
        self.a, self.delta, self.s = layer_derivatives(self.network, F.cross_entropy, name, self.x, self.y)

    def terms(self, pairs: Pairs) -> DualityTerms:
        own, other = (list(side) for side in zip(*pairs, strict=True))
        shifts = self.a[other] - self.a[own]
        return duality_terms(self.weight, self.a[own], self.delta[own], self.s[own], shifts)

    def sums(self, batches: Sequence[Pairs]) -> DualitySums:
        sums = DualitySums(*self.weight.shape)
        for pairs in batches:
            sums.add(self.terms(pairs))
        return sums

    def pairs(self, *batches: Sequence[int]) -> list[Pairs]:
        """Of all ordered pairs of mini-batches."""
        return [
            nearest_of_class(self.x, self.y.tolist(), one, two) for one in batches for two in batches if one is not two
        ]


def test_terms_are_those_of_the_definition() -> None:
    """h_p Δw_p and (∇Δw_p)ᵀ∇ℓ_p with dense Hessians and the Jacobian of ΔW*(W)."""
    case = Case()
    pairs = [(0, 3), (1, 16), (17, 2)]
    terms = case.terms(pairs)
    for place, (p, other) in enumerate(pairs):
        one, two = two_terms(case.samples, case.weight, case.a, p, other)
        assert_same(terms.term_one()[place].flatten(), one)
        assert_same(terms.term_two()[place].flatten(), two)


def test_terms_are_the_change_of_the_gradient_to_first_order() -> None:
    """A first layer, whose inputs are those of the network: what is left falls by four as the change halves."""
    case = Case("0.weight")
    direction, errors = random(6, seed=5), []
    before = case.samples.gradients[0]
    for size in (1e-2, 5e-3, 2.5e-3):
        shift = size * direction
        after = samples_of(case.network, F.cross_entropy, "0.weight", case.x[:1] + shift, case.y[:1]).gradients[0]
        terms = duality_terms(case.weight, case.a[:1], case.delta[:1], case.s[:1], shift[None])
        both = (terms.term_one() + terms.term_two()).flatten()
        errors.append(float((after - before - both).norm()))
        # Neither of them alone.
        assert errors[-1] < 0.1 * float((after - before - terms.term_one().flatten()).norm())
        assert errors[-1] < 0.1 * float((after - before - terms.term_two().flatten()).norm())
    # Third order: 1e-2 of the second, halving with it.
    assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(4.0, rel=0.025)


def test_terms_of_a_dead_input_are_their_limit() -> None:
    """a → 0 makes Δw infinite, and h Δw and (∇Δw)ᵀ∇ℓ what they are here."""
    ones = torch.ones(1, 2, dtype=torch.float64)
    arguments = random(2, 2), 0.0 * ones, ones, torch.eye(2)[None], 3.0 * ones
    terms = duality_terms(*arguments)
    assert terms.term_one().abs().max() == 0.0
    assert_same(terms.term_two()[0], torch.full((2, 2), 3.0, dtype=torch.float64))
    sums = DualitySums(2, 2)
    sums.add(terms)
    assert all(bool(matrix.isfinite().all()) for matrix in sums.matrices().values())
    assert math.isnan(sums.weight_variance)  # there is no Δw
    weight, _, *others = arguments
    sums.add(duality_terms(weight, ones, *others))
    assert sums.weight_variance == pytest.approx(float((weight @ (3.0 * ones[0])).square().sum()) / 2 / 2)


@pytest.mark.parametrize(
    "batches",
    [
        [range(18)[:6], range(18)[6:12], range(18)[12:]],
        # Of several sizes; the second lacks class 2, so that samples of others have no partner there.
        [range(18)[:9], [9, 10, 12], range(18)[13:]],
    ],
)
def test_chain_equals_loops(batches: Sequence[Sequence[int]]) -> None:
    case = Case()
    pairs = case.pairs(*batches)
    expected = duality_of(case.samples, case.weight, case.a, pairs)
    sums = case.sums(pairs)
    found = sums.matrices(case.samples.second_moment())
    assert sums.batches == 6
    assert sums.weight_variance == pytest.approx(expected.weight_variance, rel=SAME)
    assert set(found) == {*CHAIN, "hg", "gg"} == set(expected.matrices)
    for name, matrix in expected.matrices.items():
        assert_same(found[name], matrix)
        assert_same(found[name], found[name].T)
    assert_same(found["raw"], found["hh"] + found["hg"] + found["gg"])
    # Each step of the chain leaves something out.
    for one, two in itertools.pairwise(CHAIN):
        assert float((found[one] - found[two]).norm()) > 0.01 * float(found[one].norm())


def test_raw_is_the_scatter_of_gradients_where_mini_batches_are_near_each_other() -> None:
    """½E[g_μν g_μνᵀ] of two mini-batches of B samples is C of single ones over B, whatever has been approximated."""
    case = Case("0.weight")
    x = case.x[:1] + 1e-4 * random(12, 6, seed=7)  # twelve near neighbours of one class
    samples = samples_of(case.network, F.cross_entropy, "0.weight", x, case.y[:1].expand(12))
    a, delta, s = layer_derivatives(case.network, F.cross_entropy, "0.weight", x, case.y[:1].expand(12))
    sums = DualitySums(*case.weight.shape)
    for one in range(12):
        for other in range(12):  # B = 1: ½E[(g_i − g_j)(g_i − g_j)ᵀ] over all i, j is the covariance
            sums.add(duality_terms(case.weight, a[[one]], delta[[one]], s[[one]], a[[other]] - a[[one]]))
    expected = noise_covariance(samples.gradients)
    found = sums.matrices()["raw"]
    # What first order leaves out is of the size of the change, 1e-4 times a few.
    assert float((found - expected).norm()) < 3e-3 * float(expected.norm())


def test_single_samples_have_no_products_of_different_ones() -> None:
    case = Case()
    found = case.sums(case.pairs([0], [3], [6])).matrices()
    assert_same(found["hh"], found["hh_sd"])


def test_sums_add_up() -> None:
    """More mini-batches than are multiplied at once, split over three accumulators as over ranks."""
    case = Case()
    pairs = [[(i % 18, (i + 3 * (1 + i % 5)) % 18)] for i in range(150)]
    whole, parts = case.sums(pairs), [case.sums(pairs[:7]), case.sums(pairs[7:90]), case.sums(pairs[90:])]
    merged = DualitySums(*case.weight.shape)
    merged.add(case.terms(pairs[0]))  # waits to be multiplied, and is thrown away
    merged.state = torch.stack([part.state for part in parts]).sum(0)
    assert merged.batches == whole.batches == 150
    assert merged.weight_variance == pytest.approx(whole.weight_variance, rel=SAME)
    for name, matrix in whole.matrices().items():
        assert_same(merged.matrices()[name], matrix)
    # Asking on the way changes nothing, and the sums can go on after a merge.
    merged.state = sum((part.state for part in parts[1:]), parts[0].state)
    merged.add(case.terms([(0, 3), (1, 4)]))
    whole.matrices()
    whole.add(case.terms([(0, 3), (1, 4)]))
    assert_same(merged.state, whole.state)


def test_nothing_added() -> None:
    sums = DualitySums(2, 3)
    case = torch.zeros(0, 3), torch.zeros(0, 2), torch.zeros(0, 2, 2), torch.zeros(0, 3)
    sums.add(duality_terms(torch.ones(2, 3), *case))
    assert sums.batches == 0
    assert sums.state.abs().max() == 0.0
    assert math.isnan(sums.weight_variance)
    assert all(bool(matrix.isnan().all()) for matrix in sums.matrices().values())
