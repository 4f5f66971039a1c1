"""Exact products, column by column, against matrices formed from the definitions in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_curvature.operators import GaussNewtonOperator, HessianOperator, MicroBatch
from lightning_curvature.operators.micro_batches import Evaluation
from tests.helpers.operators import CASES, INDEPENDENT, Odd, matrix, off, rounding, trained
from tests.oracles.matrices import Matrices


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["hessian", "gauss_newton"])
@pytest.mark.thinned(3)
def test_every_column(kind: str, name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    network, data = case.network(dtype), case.data(8, 2, dtype=dtype)
    # Before the operator: in training mode each forward moves the running statistics.
    truth = getattr(Matrices(network, case.loss), kind)(data)
    operator = {"hessian": HessianOperator, "gauss_newton": GaussNewtonOperator}[kind].of(network, case.loss, data)
    found = matrix(operator)
    assert found.dtype == dtype
    assert off(found, truth) < rounding(dtype)
    assert off(found, found.T.double()) < rounding(dtype)


@pytest.mark.parametrize("name", INDEPENDENT)
@pytest.mark.parametrize("kind", [HessianOperator, GaussNewtonOperator])
def test_ragged_micro_batches_are_one_batch(kind: Any, name: str) -> None:
    case = CASES[name]
    network = case.network()
    whole = matrix(kind.of(network, case.loss, case.data(10)))
    # Only the order of the sums differs.
    assert off(matrix(kind.of(network, case.loss, case.data(8, 2))), whole) < rounding(torch.float64)
    assert off(matrix(kind.of(network, case.loss, case.data(3, 3, 3, 1))), whole) < rounding(torch.float64)


def test_batch_norm_in_training_mode_is_the_mean_of_the_micro_batches_losses() -> None:
    case = CASES["batch norm, train"]
    network = case.network()
    matrices = Matrices(network, case.loss)
    first, second = case.data(8, 2)
    mean = 0.8 * matrices.hessian([first]) + 0.2 * matrices.hessian([second])
    assert off(matrix(HessianOperator.of(network, case.loss, [first, second])), mean) < rounding(torch.float64)
    assert off(matrices.hessian(case.data(10)), mean) > 0.1


def test_frozen_parameters_are_not_in_the_space_and_unused_ones_have_zeros() -> None:
    case = CASES["odd"]
    network = case.network()
    found = matrix(HessianOperator.of(network, case.loss, case.data(10)))
    assert isinstance(network, Odd)
    names = [name for name, p in network.named_parameters() if p.requires_grad]
    assert found.shape == (sum(p.numel() for p in trained(network)),) * 2
    assert not any(name.startswith("frozen") for name in names)
    used = torch.cat([torch.full((p.numel(),), p is not network.unused) for p in trained(network)])
    assert not found[~used].any()
    assert not found[:, ~used].any()
    assert found[used][:, used].any(dim=0).all()


@pytest.mark.parametrize("name", ["perceptron", "tied"])
def test_a_part_of_the_parameters_gives_its_block(name: str) -> None:
    case = CASES[name]
    network, data = case.network(), case.data(10)
    ((x, y),) = data
    size = trained(network)[0].numel()

    def evaluate() -> Evaluation:
        z = network(x)
        return Evaluation(case.loss(z, y), z)

    truth = Matrices(network, case.loss).hessian(data)[:size, :size]
    found = matrix(HessianOperator([MicroBatch(evaluate, 1.0)], trained(network)[:1]))
    assert off(found, truth) < rounding(torch.float64)


def test_a_penalty_on_the_parameters_is_in_the_hessian_alone() -> None:
    case = CASES["perceptron"]
    network, data = case.network(), case.data(8, 2)
    parameters = trained(network)

    def part(x: Tensor, y: Tensor) -> MicroBatch:
        def evaluate() -> Evaluation:
            z = network(x)
            penalty = 0.05 * sum((p**4).sum() for p in parameters)
            return Evaluation(case.loss(z, y) + penalty, z)

        return MicroBatch(evaluate, len(y) / 10)

    parts = [part(x, y) for x, y in data]
    matrices = Matrices(network, case.loss)
    bend = torch.diag(0.6 * matrices.theta**2)  # second derivative of 0.05 θ⁴
    assert off(matrix(HessianOperator(parts, parameters)), matrices.hessian(data) + bend) < rounding(torch.float64)
    assert off(matrix(GaussNewtonOperator(parts, parameters)), matrices.gauss_newton(data)) < rounding(torch.float64)


def test_gauss_newton_of_a_linear_model_is_the_hessian() -> None:
    torch.manual_seed(0)
    network, data = nn.Linear(4, 3).double(), CASES["perceptron"].data(8, 2)
    hessian = matrix(HessianOperator.of(network, F.cross_entropy, data))
    found = matrix(GaussNewtonOperator.of(network, F.cross_entropy, data))
    assert off(found, hessian) < rounding(torch.float64)


@pytest.mark.parametrize("kind", [HessianOperator, GaussNewtonOperator])
def test_parameters_in_half_precision(kind: Any) -> None:
    case = CASES["perceptron"]
    network, data = case.network(torch.bfloat16), case.data(8, 2, dtype=torch.bfloat16)
    name = "hessian" if kind is HessianOperator else "gauss_newton"
    truth = getattr(Matrices(network, case.loss), name)(data)
    found = matrix(kind.of(network, case.loss, data))
    assert found.dtype == torch.float32
    # Some thirty roundings on the way forward and twice back, each of 2⁻⁸ at most, that add up like a random walk.
    assert off(found, truth) < 30**0.5 * 2.0**-8


@pytest.mark.parametrize("kind", [HessianOperator, GaussNewtonOperator])
def test_a_product_leaves_parameters_gradients_and_the_vector_alone(kind: Any) -> None:
    case = CASES["odd"]
    network, data = case.network(), case.data(8, 2)
    for p in trained(network)[::2]:
        p.grad = torch.ones_like(p)
    before = copy.deepcopy(network.state_dict())
    operator = kind.of(network, case.loss, data)
    vector = torch.ones(operator.space.size, dtype=torch.float64)
    first = operator(vector)
    assert torch.equal(operator(vector), first)
    assert first.data_ptr() != vector.data_ptr()
    assert not first.requires_grad
    assert torch.equal(vector, torch.ones_like(vector))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert [p.grad is None or bool((p.grad == 1.0).all()) for p in trained(network)] == [True] * len(trained(network))
    assert [p.grad is None for p in trained(network)] == [i % 2 == 1 for i in range(len(trained(network)))]


def test_where_gradients_are_off() -> None:
    case = CASES["attention"]
    network, data = case.network(), case.data(8, 2)
    truth = matrix(HessianOperator.of(network, case.loss, data))
    with torch.no_grad():
        assert torch.equal(matrix(HessianOperator.of(network, case.loss, data)), truth)


class NormalizedByHand(nn.Module):
    """What weight normalization makes of a linear layer."""

    def __init__(self, bias: Tensor, g: Tensor, v: Tensor, dim: int) -> None:
        super().__init__()
        self.bias, self.g, self.v = (nn.Parameter(t.detach().clone()) for t in (bias, g, v))
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.g * self.v / self.v.square().sum(1 - self.dim, keepdim=True).sqrt(), self.bias)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("kind", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("make", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm], ids=["new", "old"])
def test_weight_normalization(make: Any, dim: int, kind: str) -> None:
    """The second derivatives of torch's fused function take the norms for constants: as much as 100 % off."""
    fused = torch._weight_norm
    case = CASES["perceptron"]
    network, data = make(nn.Linear(4, 3).double(), dim=dim), case.data(8)
    truth = getattr(Matrices(NormalizedByHand(*network.parameters(), dim), case.loss), kind)(data)
    operator = {"hessian": HessianOperator, "gauss_newton": GaussNewtonOperator}[kind].of(network, case.loss, data)
    assert off(matrix(operator), truth) < rounding(torch.float64)
    assert torch._weight_norm is fused
