"""The metrics of mini-batch sharpness, fed every mini-batch there is, against the exact expectations."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_curvature.metrics import (
    BatchLambdaMax,
    BatchSharpness,
    GradientNoiseInteraction,
    InteractionAwareSharpness,
    ModifiedBatchSharpness,
    StepSharpness,
)
from lightning_curvature.operators import HessianOperator
from lightning_curvature.operators.mini_batch import MiniBatch
from tests.helpers.runs import Batch, classification, mlp
from tests.helpers.sharpness_metrics import CURVATURE, Point, fed, quadratic
from tests.oracles.matrices import Matrices
from tests.oracles.mini_batches import MiniBatches

# Products in float64 with some hundred roundings of 1e-16 each, means over up to 100 draws; the dense ones likewise.
# Expectations of which parts cancel to a tenth.
CLOSE = {"rel": 1e-11}
SAMPLES, SIZE = 5, 2

NETWORK = mlp(4, 3, 3)
((X, Y),) = classification(1, SAMPLES)
# All samples, in batches of which none is as large as the other.
DATA = [(X[:4], Y[:4]), (X[4:], Y[4:])]

Kind = Callable[..., Any]


@functools.cache
def oracle(replacement: bool = False, kind: str = "hessian", size: int = SIZE) -> MiniBatches:
    return MiniBatches(NETWORK, F.cross_entropy, X, Y, size, replacement, kind)


def all_pairs(batches: list[Batch]) -> list[Batch]:
    """Every ordered pair of independent mini-batches, one after the other."""
    return [batch for pair in itertools.product(batches, repeat=2) for batch in pair]


cases = pytest.mark.parametrize("kind", ["hessian", "gauss_newton"])
drawn = pytest.mark.parametrize("replacement", [False, True])


@cases
@drawn
def test_own_curvature_over_all_batches(kind: Any, replacement: bool) -> None:
    truth = oracle(replacement, kind)
    for metric, expected in [
        (BatchSharpness(NETWORK, F.cross_entropy, curvature=kind), truth.batch_sharpness()),
        (ModifiedBatchSharpness(NETWORK, F.cross_entropy, curvature=kind), truth.modified_batch_sharpness()),
    ]:
        assert fed(metric, truth.batches) == pytest.approx(expected, **CLOSE)
        assert metric.count() == len(truth.batches)
        assert metric.standard_error().dtype == torch.float64


def test_standard_errors_are_those_of_the_draws() -> None:
    truth = oracle()
    count = len(truth.batches)
    plain = BatchSharpness(NETWORK, F.cross_entropy)
    fed(plain, truth.batches)
    ratios = truth.own_curvatures() / truth.squares()
    assert plain.standard_error().item() == pytest.approx((ratios.std() / count**0.5).item(), **CLOSE)
    modified = ModifiedBatchSharpness(NETWORK, F.cross_entropy)
    fed(modified, truth.batches)
    residuals = truth.own_curvatures() - truth.modified_batch_sharpness() * truth.squares()
    expected = residuals.square().sum().div(count * (count - 1)).sqrt() / truth.squares().mean()
    assert modified.standard_error().item() == pytest.approx(expected.item(), **CLOSE)


@cases
@drawn
def test_full_curvature_with_the_data(kind: Any, replacement: bool) -> None:
    truth = oracle(replacement, kind)
    options: dict[str, Any] = {"data": DATA, "curvature": kind}
    ias = InteractionAwareSharpness(NETWORK, F.cross_entropy, **options)
    assert fed(ias, truth.batches) == pytest.approx(truth.ias(), **CLOSE)
    gni = GradientNoiseInteraction(NETWORK, F.cross_entropy, **options)
    assert fed(gni, truth.batches) == pytest.approx(truth.gni(), **CLOSE)
    # The denominator is one number: all of the error is that of the numerator's mean.
    spread = truth.full_curvatures().std() / len(truth.batches) ** 0.5 / truth.gradient.square().sum()
    assert gni.standard_error().item() == pytest.approx(spread.item(), **CLOSE)
    assert ias.count() == gni.count() == len(truth.batches)


@cases
@drawn
@pytest.mark.thinned(3)
def test_full_curvature_over_all_pairs(kind: Any, replacement: bool) -> None:
    """The Hessian of the other batch is the full one in the mean; tuples of one sample, so that pairs stay few."""
    truth = oracle(replacement, kind, size=1 if replacement else SIZE)
    batches = all_pairs(truth.batches)
    ias = InteractionAwareSharpness(NETWORK, F.cross_entropy, curvature=kind)
    assert fed(ias, batches) == pytest.approx(truth.ias(), **CLOSE)
    gni = GradientNoiseInteraction(NETWORK, F.cross_entropy, curvature=kind)
    assert fed(gni, batches) == pytest.approx(truth.gni(), **CLOSE)
    assert ias.count() == gni.count() == len(truth.batches) ** 2


def test_a_pair_is_both_ways_round() -> None:
    truth = oracle()
    (g, other), (h, crossed) = truth.gradients[:2], truth.matrices[:2]
    numerator = 0.5 * (g @ crossed @ g + other @ h @ other)
    ias = InteractionAwareSharpness(NETWORK, F.cross_entropy)
    assert fed(ias, truth.batches[:2]) == pytest.approx((numerator / truth.squares()[:2].mean()).item(), **CLOSE)
    gni = GradientNoiseInteraction(NETWORK, F.cross_entropy)
    assert fed(gni, truth.batches[:2]) == pytest.approx((numerator / (g @ other)).item(), **CLOSE)


def test_disjoint_pairs_are_off_by_what_is_said() -> None:
    truth = oracle()
    chosen = list(itertools.combinations(range(SAMPLES), SIZE))
    pairs = [(i, j) for i, a in enumerate(chosen) for j, b in enumerate(chosen) if not set(a) & set(b)]
    metric = InteractionAwareSharpness(NETWORK, F.cross_entropy)
    found = fed(metric, [truth.batches[k] for pair in pairs for k in pair])
    full, own = truth.full_curvatures().mean(), truth.own_curvatures().mean()
    expected = (full + SIZE / (SAMPLES - SIZE) * (full - own)) / truth.squares().mean()
    assert found == pytest.approx(expected.item(), **CLOSE)
    assert abs(found - truth.ias()) > 1e-3 * abs(found)


def test_largest_eigenvalues() -> None:
    truth = oracle()
    metric = BatchLambdaMax(NETWORK, F.cross_entropy, tolerance=1e-7)
    # Values are off by less than their residuals.
    assert fed(metric, truth.batches) == pytest.approx(truth.lambda_max(), rel=1e-7)
    assert metric.pairs is not None
    values = torch.linalg.eigvalsh(truth.matrices)[:, -1]
    assert metric.standard_error().item() == pytest.approx((values.std() / len(values) ** 0.5).item(), rel=1e-5)
    assert all(metric.pairs.converged)


def test_step_sharpness_is_of_the_last_batch() -> None:
    truth = oracle()
    metric = StepSharpness(NETWORK, F.cross_entropy)
    ratios = (truth.own_curvatures() / truth.squares()).tolist()
    for (x, y), expected in zip(truth.batches, ratios, strict=True):
        metric.update(x, y)
        assert metric.compute().item() == pytest.approx(expected, **CLOSE)
        assert metric.standard_error().isnan()
        assert metric.count() == 1


def test_all_samples_make_all_ratios_equal() -> None:
    truth = oracle(size=SAMPLES)
    expected = truth.gradient_curvature() / float(truth.gradient.square().sum())
    for kind, options in [
        (BatchSharpness, {}),
        (ModifiedBatchSharpness, {}),
        (InteractionAwareSharpness, {}),
        (InteractionAwareSharpness, {"data": DATA}),
        (GradientNoiseInteraction, {}),
        (GradientNoiseInteraction, {"data": DATA}),
    ]:
        metric = kind(NETWORK, F.cross_entropy, **options)
        # The same batch again and again: what is drawn does not scatter at all.
        assert fed(metric, truth.batches * 4) == pytest.approx(expected, **CLOSE)
        assert metric.standard_error().item() == 0.0


@drawn
@pytest.mark.parametrize("kind", [InteractionAwareSharpness, GradientNoiseInteraction])
def test_one_batch_size_gives_all_others(kind: Any, replacement: bool) -> None:
    truth = oracle(replacement)
    metric = kind(NETWORK, F.cross_entropy, data=DATA)
    fed(metric, truth.batches)
    terms = metric.noise_terms(replacement)
    # A difference of two means over a factor of 3/8 or 1/2.
    assert terms.noise_curvature == pytest.approx(truth.noise_curvature(), rel=1e-10)
    assert terms.noise_square == pytest.approx(truth.noise_square(), rel=1e-10)
    sizes = [1, 2] if replacement else [1, 2, 3, 5]
    others = [oracle(replacement, size=size) for size in sizes]
    expected = [other.ias() if kind is InteractionAwareSharpness else other.gni() for other in others]
    assert metric.over_batch_sizes(sizes, replacement).tolist() == pytest.approx(expected, rel=1e-10)
    assert metric.over_batch_sizes(2, replacement).shape == ()


def test_batches_of_several_sizes_count_with_their_harmonic_mean() -> None:
    ones, threes = oracle(size=1), oracle(size=3)
    metric = InteractionAwareSharpness(NETWORK, F.cross_entropy, data=DATA)
    # Each size as often as the other.
    fed(metric, ones.batches * 2 + threes.batches)
    terms = metric.noise_terms()
    assert terms.noise_curvature == pytest.approx(ones.noise_curvature(), rel=1e-10)
    assert terms.noise_square == pytest.approx(ones.noise_square(), rel=1e-10)


def test_ragged_mini_batches_count_once_each() -> None:
    """They are what training steps on, whatever their size; within one all samples weigh the same."""
    sizes = (2, 1, 2)
    batches = list(zip(X.split(sizes), Y.split(sizes), strict=True))
    dense = Matrices(NETWORK, F.cross_entropy)
    curvatures = torch.stack([g @ dense.hessian([b]) @ g for b in batches for g in [dense.gradient([b])]])
    squares = torch.stack([dense.gradient([b]).square().sum() for b in batches])
    found = fed(BatchSharpness(NETWORK, F.cross_entropy), batches)
    assert found == pytest.approx((curvatures / squares).mean().item(), **CLOSE)
    found = fed(ModifiedBatchSharpness(NETWORK, F.cross_entropy), batches)
    assert found == pytest.approx((curvatures.mean() / squares.mean()).item(), **CLOSE)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("lr", [0.1, 1.3])  # the edge is 2/1.5
def test_where_sgd_is_stationary_gni_is_two_over_lr_and_batch_sharpness_the_curvature(lr: float, size: int) -> None:
    r"""Edge of stochastic stability (2025), figure 3: L(θ) = ½h E(θ − a_i)².

    With s² the variance of a batch's mean of a_i, θ ← θ − ηh(θ − ā_B) makes the variance v of θ − ā
    (1−ηh)²v + η²h²s², and v = ηhs²/(2−ηh) where it is stationary. There E[g_BHg_B]/E[g²] = h³(v+s²)/(h²v) = 2/η.
    """
    a = torch.tensor([-1.2, 0.3, 0.4, 2.0, 0.9], dtype=torch.float64)
    batches = [a[list(chosen)] for chosen in itertools.combinations(range(len(a)), size)]
    noise = torch.stack([batch.mean() for batch in batches]).var(unbiased=False).item()
    variance = lr * CURVATURE * noise / (2.0 - lr * CURVATURE)
    gni = GradientNoiseInteraction(Point(0.0), quadratic, data=[(a, a)])
    sharpness = BatchSharpness(gni._model[0], quadratic)
    point, squares = gni._model[0], []
    # Two places have the stationary mean and variance; all batches at both have them again after a step.
    for side in (-1.0, 1.0):
        for batch in batches:
            point.theta.data.fill_(a.mean().item() + side * variance**0.5)
            gni.update(batch, batch)
            sharpness.update(batch, batch)
            quadratic(point(batch), batch).backward()
            with torch.no_grad():
                squares.append((point.theta - lr * point.theta.grad - a.mean()).square())
            point.theta.grad = None
    assert torch.stack(squares).mean().item() == pytest.approx(variance, rel=1e-12)
    # Some ten roundings each.
    assert gni.compute().item() == pytest.approx(2.0 / lr, rel=1e-12)
    assert sharpness.compute().item() == pytest.approx(CURVATURE, rel=1e-12)
    assert sharpness.standard_error().item() == pytest.approx(0.0, abs=1e-14)


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e8, 1e30])
def test_small_and_large_gradients_in_float32(scale: float) -> None:
    """Products of two leave the range of float32, 1e-38 to 1e38, where their ratio is 1."""
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(scale)
    x = torch.ones(4, 2) / 2.0**0.5

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (z - y).square().mean()

    operator = HessianOperator.of(model, loss, [(x, torch.zeros(4, 1))])
    if scale > 1.0:
        # The loss itself is infinite there; its gradient, from the difference of outputs and targets, is not.
        assert torch.isinf(loss(model(x), torch.zeros(4, 1))) == (scale > 1e10)
    batch = MiniBatch(operator)
    # H = xxᵀ of a unit vector x, to which the gradient is parallel; some ten roundings of 6e-8.
    assert batch.self_curvature / batch.squared_norm == pytest.approx(1.0, rel=1e-6)
    assert batch.curvature_along(batch.gradient) == pytest.approx(batch.self_curvature, rel=1e-6)
