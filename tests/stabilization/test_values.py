"""Stabilization criteria against dense derivatives, quadrature, and losses that are exactly quadratic."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_curvature import StabilizationMonitor
from lightning_curvature.functional import gaussian_moment
from lightning_curvature.stabilization.result import CriterionRow, SampleGrowth
from tests.helpers.growth import model_of
from tests.helpers.runs import make_trainer
from tests.helpers.stabilization_values import (
    CANDIDATES,
    SAMPLES,
    SIZES,
    TIGHT,
    classifier_case,
    dense_moment,
    in_order,
    mean_and_error,
)
from tests.oracles.sample_growth import (
    Quadratics,
    dense_increment,
    gaussian_mean,
    mean_hessian,
    random_quadratics,
    top_eigenvectors,
)


class OfQuadratics(pl.LightningModule):
    """Its losses are those of :class:`Quadratics`, at its only parameter."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.linspace(-1.0, 1.0, size, dtype=torch.float64))

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        offsets, centres, matrices = batch
        away = self.w - centres
        return (offsets + 0.5 * torch.einsum("ni,nij,nj->n", away, matrices, away)).mean()


def evaluated(module: pl.LightningModule, data: TensorDataset, **options: Any) -> SampleGrowth:
    defaults: dict[str, Any] = {"sample_sizes": SIZES, "candidates": CANDIDATES, "tolerance": 1e-10}
    return (
        StabilizationMonitor(**(defaults | options))
        .evaluate(module, DataLoader(data, batch_size=7), trainer=make_trainer())
        .result
    )


def rows(growth: SampleGrowth, criterion: str, estimator: str) -> list[CriterionRow]:
    found = [row for row in growth.rows if (row.criterion, row.estimator) == (criterion, estimator)]
    assert found
    return found


def quadratic_case(size: int = 6, seed: int = 0) -> tuple[OfQuadratics, TensorDataset, Quadratics]:
    """Module, data, and the same losses in the order in which they are taken."""
    q = random_quadratics(SAMPLES, size, seed)
    order = in_order(SIZES[-1] + CANDIDATES)
    ordered = Quadratics(q.offsets[order], q.centres[order], q.matrices[order])
    return OfQuadratics(size), TensorDataset(q.offsets, q.centres, q.matrices), ordered


def dense_deformation(losses: Callable[[Tensor], Tensor], w: Tensor, k: int, basis: Tensor, sigma: float) -> float:
    """Mean over new samples of E(q − a)²."""
    values = []
    for j in range(k, k + CANDIDATES):
        one = dense_increment(losses, w, k, j).within(basis)
        values.append(float(gaussian_moment(model_of(replace(one, a=torch.zeros_like(one.a))), sigma)))
    return sum(values) / len(values)


def check_mean(row: CriterionRow, values: list[float], tolerance: float) -> None:
    value, error = mean_and_error(values)
    assert row.value == pytest.approx(value, rel=tolerance)
    assert row.stderr_samples == pytest.approx(error, rel=max(tolerance, 1e-6))


def test_closed_form_of_quadratic_losses() -> None:
    """No eigenvector is needed to be exact but those of the subspace, and the model is the truth."""
    module, data, q = quadratic_case()
    growth = evaluated(module, data, subspace_dim=(1, 3), sigma=(0.01, 2.0))
    w = module.w.detach()
    found = rows(growth, "delta_2_subspace", "gaussian_moment")
    assert [(row.k, row.dimension, row.sigma) for row in found] == [
        (k, d, s) for k in SIZES for d in (3, 1) for s in (0.01, 2.0)
    ]
    for row in found:
        basis = top_eigenvectors(mean_hessian(q.losses, w, row.k), row.dimension)
        check_mean(row, dense_moment(q.losses, w, row.k, basis, row.sigma), 1e-10)
        assert row.deformation == pytest.approx(dense_deformation(q.losses, w, row.k, basis, row.sigma), rel=1e-10)
        assert row.stderr_draws == 0.0
        assert row.converged
        # Of the largest D: the others were not compared.
        assert (row.model_error < 1e-10) == (row.dimension == 3)
    assert growth.validated_sigma == growth.validated_sigma_full_space == 2.0
    for row in rows(growth, "delta_1", "exact"):
        check_mean(row, [abs(float(dense_increment(q.losses, w, row.k, j).a)) for j in range(row.k, row.k + 4)], 1e-12)


@pytest.mark.slow
def test_all_estimators_of_quadratic_losses_agree() -> None:
    module, data, q = quadratic_case()
    every = ("gaussian_moment", "quadratic", "direct")
    growth = evaluated(module, data, subspace_dim=2, sigma=0.7, estimators=every, draws=400, trace_vectors=40)
    for closed, modelled, direct in zip(*(rows(growth, "delta_2_subspace", name) for name in every), strict=True):
        # The same probes, the same function.
        assert direct.value == pytest.approx(modelled.value, rel=1e-10)
        assert direct.stderr_draws == pytest.approx(modelled.stderr_draws, rel=1e-8)
        assert direct.deformation == pytest.approx(modelled.deformation, rel=1e-8)
        # 400 squares of about two coordinates: 7 % each, and as much again for the heavier quartic part.
        assert direct.deformation == pytest.approx(closed.deformation, rel=0.4)
        assert 0.0 < direct.stderr_draws < 0.3 * direct.value
        assert abs(direct.value - closed.value) < 4.0 * direct.stderr_draws
    full = torch.eye(6, dtype=torch.float64)
    for modelled, direct in zip(*(rows(growth, "delta_2", name) for name in every[1:]), strict=True):
        assert direct.value == pytest.approx(modelled.value, rel=1e-9)
        assert direct.deformation == pytest.approx(modelled.deformation, rel=1e-8)
        assert direct.model_error < 1e-9
    for name in ("gaussian_moment", "direct"):
        for row in rows(growth, "delta_2", name):
            expected = dense_moment(q.losses, module.w.detach(), row.k, full, 0.7)
            assert row.dimension == 6
            assert 0.0 < row.stderr_draws < 0.3 * row.value
            assert abs(row.value - sum(expected) / len(expected)) < 4.0 * row.stderr_draws
            deformation = dense_deformation(q.losses, module.w.detach(), row.k, full, 0.7)
            assert row.deformation == pytest.approx(deformation, rel=0.4)


@pytest.mark.slow
def test_full_space_of_a_network() -> None:
    """Traces of random vectors: unbiased, and their error is known."""
    module, data, losses, w = classifier_case()
    distances = []
    for seed in range(6):
        growth = evaluated(
            module, data, quantities=("delta_2",), sigma=0.5, seed=seed, trace_vectors=12, sample_sizes=(9,)
        )
        (row,) = rows(growth, "delta_2", "gaussian_moment")
        if seed == 0:
            expected = dense_moment(losses, w, 9, torch.eye(len(w), dtype=torch.float64), 0.5)
            assert abs(row.value - sum(expected) / len(expected)) < 4.0 * row.stderr_draws
        distances.append(row.stderr_draws / row.value)
    assert 1e-4 < max(distances) < 0.2


@pytest.mark.parametrize("order", [1.0, 2.0, 3.0])
@pytest.mark.slow
def test_direct_is_the_integral_of_the_true_loss(order: float) -> None:
    """At a σ where no quadratic model holds; quadrature of a smooth function, to 1e-6 with twenty nodes."""
    module, data, losses, w = classifier_case()
    growth = evaluated(
        module, data, quantities=("delta_2_subspace",), subspace_dim=2, sigma=1.5, estimators=("direct",), draws=600,
        order=order, sample_sizes=(9,), candidates=1,
    )  # fmt: skip
    name = {1.0: "delta_1_mean_subspace", 2.0: "delta_2_subspace", 3.0: "delta_3_subspace"}[order]
    (row,) = rows(growth, name, "direct")
    basis = top_eigenvectors(mean_hessian(losses, w, 9), 2)

    def power(z: Tensor) -> Tensor:
        values = losses(w + basis @ z)
        return (values[:10].mean() - values[:9].mean()).abs() ** order

    expected = float(gaussian_mean(power, 2, 1.5, nodes=30))
    assert abs(row.value - expected) < 4.0 * row.stderr_draws
    assert row.stderr_draws < 0.2 * row.value
    assert row.model_error > 0.05
    assert math.isnan(row.stderr_samples)  # of one sample
    # And to order 2 the quadratic model is off by more than the draws.
    if order == 2.0:
        closed = float(gaussian_moment(model_of(dense_increment(losses, w, 9).within(basis)), 1.5))
        assert abs(row.value - closed) > 4.0 * row.stderr_draws


def test_the_model_is_compared_in_the_full_space_too() -> None:
    """Where probes are longer by √(N/D), and the model ends sooner."""
    module, data, _, _ = classifier_case()
    sigmas = (1e-3, 0.1, 1.0)
    with pytest.warns(UserWarning, match=r"a quadratic model of the loss in the full space, got 1, where it is off by"):
        growth = evaluated(
            module, data, subspace_dim=2, sigma=sigmas, estimators=("gaussian_moment", "direct"), draws=32
        )
    inside, outside = growth.model_errors(True), growth.model_errors(False)
    assert all(outside[sigma] > inside[sigma] for sigma in sigmas)
    assert outside[1e-3] < 1e-3
    assert growth.validated_sigma_full_space < 1.0
    # It bounds what the closed form is off by, but for the scatter of the draws.
    for closed, direct in zip(*(rows(growth, "delta_2", name) for name in ("gaussian_moment", "direct")), strict=True):
        if direct.sigma < 1.0:
            off = abs(closed.value**0.5 - direct.value**0.5) / direct.value**0.5
            assert off < 2.0 * direct.model_error + 2.0 * direct.stderr_draws / direct.value + 0.05
    unchecked = evaluated(module, data, quantities=("delta_2",), sigma=1.0, validation_draws=0)
    assert math.isnan(unchecked.validated_sigma_full_space)


def test_model_error_grows_with_sigma_and_warns() -> None:
    module, data, _, _ = classifier_case()
    with pytest.warns(UserWarning, match=r"a quadratic model of the loss in the subspace, got 30, where it is off"):
        growth = evaluated(module, data, subspace_dim=3, sigma=(1e-3, 0.1, 30.0), model_tolerance=0.05)
    errors = growth.model_errors(in_subspace=True)
    assert errors[1e-3] < 1e-4 < errors[0.1] < 0.05 < errors[30.0]
    assert growth.validated_sigma == 0.1
    unchecked = evaluated(module, data, subspace_dim=3, sigma=30.0, validation_draws=0)
    assert all(math.isnan(row.model_error) for row in unchecked.rows)


def dominant_negative() -> tuple[OfQuadratics, TensorDataset, Quadratics]:
    """Eigenvalues −10, 5, 3, 2, 0.5 of every sample, which differ in size by a factor."""
    generator = torch.Generator().manual_seed(5)
    basis = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64))[0]
    matrix = basis @ torch.diag(torch.tensor([-10.0, 5.0, 3.0, 2.0, 0.5], dtype=torch.float64)) @ basis.T
    factors = torch.linspace(0.5, 1.5, SAMPLES, dtype=torch.float64)
    q = Quadratics(
        torch.zeros(SAMPLES, dtype=torch.float64),
        torch.randn(SAMPLES, 5, generator=generator, dtype=torch.float64),
        factors[:, None, None] * matrix,
    )
    order = in_order(SIZES[-1] + CANDIDATES)
    ordered = Quadratics(q.offsets[order], q.centres[order], q.matrices[order])
    return OfQuadratics(5), TensorDataset(q.offsets, q.centres, q.matrices), ordered


@pytest.mark.parametrize(("law", "columns"), [("top", [1, 2]), ("bottom", [0, 4])])
def test_dominant_negative_curvature(law: Any, columns: list[int]) -> None:
    """The largest eigenvalues are 5 and 3, the smallest −10 and 0.5."""
    module, data, q = dominant_negative()
    growth = evaluated(module, data, subspace_dim=2, sigma=0.5, law=law)
    w = module.w.detach()
    for row in rows(growth, "delta_2_subspace", "gaussian_moment"):
        values, vectors = torch.linalg.eigh(mean_hessian(q.losses, w, row.k))
        order = [
            next(i for i, v in enumerate(values / values[0] * -10.0) if abs(v - e) < 1e-6) for e in (-10, 5, 3, 2, 0.5)
        ]
        basis = vectors[:, [order[c] for c in columns]]
        check_mean(row, dense_moment(q.losses, w, row.k, basis, 0.5), 1e-9)


def test_given_directions_and_gradients_of_influential_samples() -> None:
    module, data, losses, w = classifier_case()
    vectors = torch.randn(3, len(w), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    given = evaluated(module, data, subspace_dim=3, sigma=0.2, directions=lambda module: vectors)
    influential = evaluated(module, data, subspace_dim=3, sigma=0.2, law="gradients")
    gradients = torch.autograd.functional.jacobian(losses, w)
    for name, growth in (("given", given), ("influential", influential)):
        for row in rows(growth, "delta_2_subspace", "gaussian_moment"):
            spanning = vectors
            if name == "influential":
                longest = gradients[: row.k].norm(dim=1).argsort(descending=True)[:3]
                spanning = gradients[longest]
            basis = torch.linalg.qr(spanning.T)[0]
            check_mean(row, dense_moment(losses, w, row.k, basis, 0.2), 1e-9)


@pytest.mark.slow
def test_random_directions_see_the_average() -> None:
    """E‖c‖² and E Tr B over random subspaces are D/N of those of the full space."""
    q = random_quadratics(2, 6)
    # Of two samples either may be the new one: a, c and B change their sign, and the square stays.
    one = dense_increment(q.losses, torch.linspace(-1.0, 1.0, 6, dtype=torch.float64), 1)
    sigma, share = 1e-2, 2 / 6
    expected = one.a**2 + share * sigma**2 * (one.c.square().sum() + one.a * one.b.trace())
    data = TensorDataset(q.offsets, q.centres, q.matrices)
    values = []
    for seed in range(100):
        growth = evaluated(
            OfQuadratics(6), data, quantities=("delta_2_subspace",), law="random", subspace_dim=2, sigma=sigma,
            sample_sizes=(1,), candidates=1, seed=seed, validation_draws=0,
        )  # fmt: skip
        values.append(growth.rows[0].value)
    found = torch.tensor(values, dtype=torch.float64) - one.a**2
    error = float(found.std()) / 10.0
    # The quartic term that is left out is σ² = 1e-4 of this; the error is a tenth of it.
    assert abs(float(found.mean() - expected + one.a**2)) < 4.0 * error
    assert error < 0.15 * abs(float(found.mean()))


@pytest.mark.slow
def test_decay_of_independent_samples() -> None:
    """−2 for squares, −1 for the value itself; the scatter of 16 new samples leaves 0.3 of either."""
    q = random_quadratics(300, 4, seed=2)
    data = TensorDataset(q.offsets, q.centres, q.matrices)
    growth = evaluated(OfQuadratics(4), data, sample_sizes=(4, 16, 64, 256), candidates=16, subspace_dim=2, sigma=0.3)
    slopes = {name[0]: slope.slope for name, slope in growth.slopes().items()}
    assert slopes["delta_1"] == pytest.approx(-1.0, abs=0.3)
    assert slopes["delta_2"] == pytest.approx(-2.0, abs=0.5)
    assert slopes["delta_2_subspace"] == pytest.approx(-2.0, abs=0.5)


@pytest.mark.parametrize("micro", [1, 4, 100])
@pytest.mark.thinned(3)
def test_ragged_micro_batches(micro: int) -> None:
    """Micro-batches that do not divide k give the same."""
    module, data, _, _ = classifier_case()
    every = ("gaussian_moment", "quadratic", "direct")
    options = {"subspace_dim": 2, "sigma": 0.3, "estimators": every, "draws": 5, "trace_vectors": 3}
    whole = evaluated(module, data, micro_batch_size=7, **options)
    cut = evaluated(module, data, micro_batch_size=micro, **options)
    for one, other in zip(whole.rows, cut.rows, strict=True):
        assert other.value == pytest.approx(one.value, rel=TIGHT)


def test_the_next_subspace_begins_with_the_last() -> None:
    """Fewer products for neighbouring k than from random vectors, for the same values."""
    module, data, _, _ = classifier_case()
    options = {"subspace_dim": 2, "sigma": 0.3, "quantities": ("delta_2_subspace",), "tolerance": 1e-3}
    together = evaluated(module, data, sample_sizes=(20, 21, 22), **options).products
    alone = [evaluated(module, data, sample_sizes=(k,), **options).products for k in (20, 21, 22)]
    assert together < sum(alone)
