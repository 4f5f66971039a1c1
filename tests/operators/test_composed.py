"""Preconditioned and second-moment operators against the explicit matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_curvature.operators import (
    GaussNewtonOperator,
    GradientDifferenceOperator,
    HessianOperator,
    PreconditionedOperator,
    SecondMomentOperator,
)
from tests.helpers.operators import CASES, matrix, off, trained
from tests.oracles.matrices import Matrices

# Some hundred roundings of products in float64, relative to the largest entry (see test_exact.py); two products one
# after the other, and 1/P between them, make a few times as many.
EXACT = 1000 * torch.finfo(torch.float64).eps


def diagonal_of(parameters: list[Tensor], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """P from 1/4 to 4."""
    g = torch.Generator().manual_seed(5)
    return [(4.0 ** (2.0 * torch.rand(p.shape, generator=g, dtype=torch.float64) - 1.0)).to(dtype) for p in parameters]


@pytest.mark.parametrize("name", ["perceptron", "tied", "odd"])
@pytest.mark.parametrize("kind", ["hessian", "gauss_newton"])
def test_preconditioned_on_both_sides(kind: str, name: str) -> None:
    case = CASES[name]
    network, data = case.network(), case.data(8, 2)
    diagonal = diagonal_of(trained(network))
    operator = {"hessian": HessianOperator, "gauss_newton": GaussNewtonOperator}[kind].of(network, case.loss, data)
    found = matrix(PreconditionedOperator(operator, diagonal))
    truth, p = getattr(Matrices(network, case.loss), kind)(data), torch.cat([d.reshape(-1) for d in diagonal])
    root = torch.diag(p.pow(-0.5))
    assert off(found, root @ truth @ root) < EXACT
    # The spectrum that decides on stability: that of P⁻¹A.
    spectrum = torch.linalg.eigvals(torch.diag(1.0 / p) @ truth).real.sort().values
    assert torch.linalg.eigvalsh(found) == pytest.approx(spectrum, abs=EXACT * float(spectrum.abs().max()))


def test_preconditioned_by_one_is_the_operator_and_by_infinity_stands_still() -> None:
    case = CASES["squared"]
    network, data = case.network(), case.data(10)
    hessian = HessianOperator.of(network, case.loss, data)
    plain, parameters = matrix(hessian), trained(network)
    ones = [torch.ones_like(p) for p in parameters]
    assert torch.equal(matrix(PreconditionedOperator(hessian, ones)), plain)
    ones[0].fill_(torch.inf)
    size = parameters[0].numel()
    found = matrix(PreconditionedOperator(hessian, ones))
    assert torch.equal(found[size:, size:], plain[size:, size:])
    assert not found[:size].any()
    assert not found[:, :size].any()


def test_preconditioner_in_half_precision_is_rooted_in_single() -> None:
    case = CASES["squared"]
    network, data = case.network(torch.float32), case.data(10, dtype=torch.float32)
    hessian = HessianOperator.of(network, case.loss, data)
    half = [torch.full_like(p, 3.0, dtype=torch.bfloat16) for p in trained(network)]
    # One third, by four roundings of single precision; the root of 3 rounded to bfloat16 would be off by 1e-3.
    assert off(matrix(PreconditionedOperator(hessian, half)), matrix(hessian).double() / 3.0) < 3e-7


def test_preconditioned_differences_and_what_is_passed_on() -> None:
    case = CASES["squared"]
    network, data = case.network(), case.data(8, 2)
    diagonal = diagonal_of(trained(network))
    exact = PreconditionedOperator(HessianOperator.of(network, case.loss, data), diagonal)
    difference = PreconditionedOperator(GradientDifferenceOperator.of(network, case.loss, data), diagonal)
    # 1e-9 of products (see test_differences.py), some of whose columns are ten times smaller than the largest.
    assert off(matrix(difference), matrix(exact)) < 1e-9
    failure = RuntimeError("as of a rank")
    difference.operator.error = failure
    assert difference.error is failure


LR = 0.7
# Mini-batches of unequal sizes, each of one or more micro-batches, these unequal, too.
GROUPS = [((6,), (2,), (3,)), ((4, 2), (1, 1, 2), (1,)), ((4, 2, 2, 3),)]


@pytest.mark.parametrize("keep", [True, False, "auto"])
@pytest.mark.parametrize("groups", GROUPS, ids=["single", "accumulated", "one mini-batch"])
@pytest.mark.thinned(7)
def test_second_moment_with_weights_of_the_mini_batches(groups: tuple[tuple[int, ...], ...], keep: bool) -> None:
    case = CASES["squared"]
    network = case.network()
    sizes = [size for group in groups for size in group]
    data = case.data(*sizes)
    numbers = [number for number, group in enumerate(groups) for _ in group]
    operator = SecondMomentOperator.of(network, case.loss, data, lr=LR, groups=numbers, keep_graph=keep)
    found = matrix(operator)

    matrices, parts = Matrices(network, case.loss), iter(data)
    batches = [[next(parts) for _ in group] for group in groups]
    hessians, weights = [matrices.hessian(batch) for batch in batches], [sum(group) / sum(sizes) for group in groups]
    mean = matrices.hessian(data)
    squares = torch.stack([w * h @ h for w, h in zip(weights, hessians, strict=True)]).sum(dim=0)
    assert off(found, -2.0 * LR * mean + LR**2 * squares) < EXACT
    # The same by the definition: E_B[(I − ηH_B)²] = I + S.
    identity = torch.eye(len(mean), dtype=torch.float64)
    assert off(identity + found, matrices.second_moment(batches, LR)) < EXACT
    assert off(found, found.T) < EXACT
    # Mini-batches differ: it is not the square of the mean, unless there is but one.
    squared = (identity - LR * mean) @ (identity - LR * mean) - identity
    assert (off(found, squared) < EXACT) == (len(groups) == 1)


def test_each_micro_batch_is_a_mini_batch_by_default_and_numbers_need_not_come_in_order() -> None:
    case = CASES["squared"]
    network, data = case.network(), case.data(4, 3, 2, 1)
    v = torch.linspace(-1.0, 1.0, sum(p.numel() for p in trained(network)), dtype=torch.float64)
    alone = SecondMomentOperator.of(network, case.loss, data, lr=LR)(v)
    assert torch.equal(SecondMomentOperator.of(network, case.loss, data, lr=LR, groups=[0, 1, 2, 3])(v), alone)
    matrices = Matrices(network, case.loss)
    mixed = matrices.second_moment([[data[0], data[3]], [data[1]], [data[2]]], LR) @ v - v
    found = SecondMomentOperator.of(network, case.loss, data, lr=LR, groups=[7, 2, 0, 7])(v)
    assert off(found, mixed) < EXACT
    assert off(alone, mixed) > 1e-3


def test_small_excess_keeps_its_digits() -> None:
    # At a tiny η the identity would leave S with few digits: here S is computed without it.
    case, lr = CASES["squared"], 1e-12
    network, data = case.network(), case.data(8, 2)
    matrices = Matrices(network, case.loss)
    found = matrix(SecondMomentOperator.of(network, case.loss, data, lr=lr))
    # η²E[H_B²] is 1e-12 of it.
    assert off(found, -2.0 * lr * matrices.hessian(data)) < EXACT + 1e-11
