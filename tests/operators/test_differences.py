"""Products by a difference of gradients: how near they are, and that the parameters come back bit for bit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from lightning_curvature.linalg import VectorSpace
from lightning_curvature.operators import GradientDifferenceOperator, MicroBatch, Sharding, micro_batches
from lightning_curvature.operators.micro_batches import Evaluation
from tests.helpers.operators import CASES, Data, trained
from tests.oracles.matrices import Matrices

# θ ± r v rounds by about 0.2 u |θ_i|. Over a distance of r = u^{1/3} ‖θ‖/10 that turns v by √2 · 0.2 u ‖θ‖/2r = 1.4
# u^{2/3}, of its length; the roundings of the gradients, a few u of the terms that cancel in them, over 2r are a few
# times as much, and along the sharpest direction the truncation of up to 6 u^{2/3} is added (the operator's comment).
# Root mean squares are at 3 to 6 u^{2/3}, with u^{2/3} = 2.4e-5 and 3.7e-11; single vectors reach twice that.
WITHIN = {torch.float32: 2e-4, torch.float64: 1e-9}
# Batch norm in training mode over two samples changes its curvature within shorter lengths.
NAMES = [name for name in CASES if name != "batch norm, train"]


def train(network: nn.Module, loss: object, data: Data, steps: int) -> None:
    optimizer = torch.optim.SGD(trained(network), lr=1.0)
    for _ in range(steps):
        optimizer.zero_grad()
        for x, y in data:
            (loss(network(x), y) * (len(y) / 10)).backward()  # type: ignore[operator]
        optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("steps", [0, 20], ids=["at initialization", "after 20 steps"])
@pytest.mark.parametrize("dtype", WITHIN, ids=["float32", "float64"])
@pytest.mark.parametrize("name", NAMES)
def test_near_the_exact_product(name: str, dtype: torch.dtype, steps: int) -> None:
    case = CASES[name]
    network, data = case.network(dtype), case.data(8, 2, dtype=dtype)
    train(network, case.loss, data, steps)
    hessian = Matrices(network, case.loss).hessian(data)
    operator = GradientDifferenceOperator.of(network, case.loss, data)
    generator = torch.Generator().manual_seed(3)
    random = torch.randn(len(hessian), 20, generator=generator, dtype=torch.float64)
    sharpest = torch.linalg.eigh(hessian).eigenvectors[:, -1:]
    for vectors in (random.to(dtype), sharpest.to(dtype)):
        truth = hessian @ vectors.double()
        found = torch.stack([operator(vector.contiguous()) for vector in vectors.T], dim=1)
        assert found.dtype == dtype
        error = torch.linalg.matrix_norm(found.double() - truth) / torch.linalg.matrix_norm(truth)
        assert error < WITHIN[dtype]


def test_the_distance_follows_the_parameters_not_the_vector() -> None:
    seen: list[Tensor] = []
    weight = nn.Parameter(torch.full((2, 2), 8.0, dtype=torch.float64))

    def evaluate() -> Evaluation:
        seen.append(weight.detach().clone())
        return Evaluation(weight.square().sum())

    operator = GradientDifferenceOperator([MicroBatch(evaluate, 1.0)], [weight])
    operator(torch.tensor([3.0, 0.0, 4.0, 0.0], dtype=torch.float64))
    # ‖θ‖ = 16, v/‖v‖ = (0.6, 0, 0.8, 0)
    distance = 0.1 * torch.finfo(torch.float64).eps ** (1 / 3) * 16.0
    step = distance * torch.tensor([[0.6, 0.0], [0.8, 0.0]], dtype=torch.float64)
    expected = [weight.detach() + step, weight.detach() - step]
    # θ ± r v is rounded to 1e-16 of 8.
    for found, wanted in zip(seen, expected, strict=True):
        assert torch.allclose(found, wanted, rtol=0.0, atol=8.0 * 2.0**-52)


@pytest.mark.parametrize("power", [-40, -1, 20, 60])
def test_the_length_of_the_vector_is_a_factor(power: int) -> None:
    case = CASES["squared"]
    network, data = case.network(), case.data(8, 2)
    operator = GradientDifferenceOperator.of(network, case.loss, data)
    vector = torch.linspace(-1.0, 1.0, operator.space.size, dtype=torch.float64)
    # Powers of two only move exponents: not even the last bit may differ.
    assert torch.equal(operator(vector * 2.0**power), operator(vector) * 2.0**power)


def test_a_vector_of_zeros_needs_no_evaluation() -> None:
    def evaluate() -> Evaluation:
        raise AssertionError("nothing to evaluate")

    weight = nn.Parameter(torch.ones(3))
    product = GradientDifferenceOperator([MicroBatch(evaluate, 1.0)], [weight])(torch.zeros(3))
    assert torch.equal(product, torch.zeros(3))


def test_parameters_of_zero_length() -> None:
    weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    bend = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    part = MicroBatch(lambda: Evaluation((bend * weight.square()).sum() / 2.0), 1.0)
    found = GradientDifferenceOperator([part], [weight])(torch.ones(3, dtype=torch.float64))
    # Of a parabola there is no truncation: roundings of gradients of the size of the distance, two units.
    assert torch.allclose(found, bend, rtol=2.0**-50, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fails_at", [None, 0, 1, 3], ids=["", "first", "second batch", "other side"])
def test_parameters_and_gradients_come_back_bit_for_bit(dtype: torch.dtype, fails_at: int | None) -> None:
    case = CASES["odd"]
    network, data = case.network(dtype), case.data(8, 2, dtype=dtype)
    parameters, calls = trained(network), 0
    for p in parameters[::2]:
        p.grad = torch.full_like(p, 0.3)
    before = [p.detach().clone() for p in network.parameters()]
    versions = [p.data_ptr() for p in network.parameters()]
    gradients = [p.grad for p in parameters]
    moved = 0

    def watched(part: MicroBatch) -> MicroBatch:
        def evaluate() -> Evaluation:
            nonlocal calls, moved
            calls += 1
            moved += any(not torch.equal(p, kept) for p, kept in zip(network.parameters(), before, strict=True))
            if calls - 1 == fails_at:
                raise RuntimeError("inside")
            return part.evaluate()

        return MicroBatch(evaluate, part.weight)

    operator = GradientDifferenceOperator([watched(p) for p in micro_batches(network, case.loss, data)], parameters)
    with pytest.raises(RuntimeError, match="inside") if fails_at is not None else contextlib.nullcontext():
        operator(torch.ones(operator.space.size, dtype=operator.space.dtype))
    assert moved == calls == (4 if fails_at is None else fails_at + 1)
    for p, kept, place in zip(network.parameters(), before, versions, strict=True):
        assert torch.equal(p, kept)
        assert p.data_ptr() == place
    for p, gradient in zip(parameters, gradients, strict=True):
        assert p.grad is gradient
        assert gradient is None or bool((gradient == torch.full_like(p, 0.3)).all())


def test_sharded_products_of_a_single_rank() -> None:
    case = CASES["squared"]
    network, data = case.network(), case.data(8, 2)
    parts, parameters = micro_batches(network, case.loss, data), trained(network)
    alone = GradientDifferenceOperator(parts, parameters)
    inside: list[bool] = []

    @contextlib.contextmanager
    def around() -> Iterator[None]:
        inside.append(True)
        yield
        inside.append(False)

    def reduce(part: Tensor) -> Tensor:
        raise AssertionError("the backward of sharded parameters reduces")

    # A third round, in which this rank has nothing: its last micro-batch again, with weight 0.
    sharding = Sharding(VectorSpace(parameters), ranks=1, around=around)
    sharded = GradientDifferenceOperator(parts, parameters, reduce=reduce, sharding=sharding)
    vector = torch.linspace(-1.0, 1.0, sharded.space.size, dtype=torch.float64)
    # Weights inside the gradient instead of outside: one rounding of gradients of size 1 over a distance of 1e-6.
    assert torch.allclose(sharded(vector), alone(vector), rtol=0.0, atol=1e-9)
    assert inside == [True, False] * 2
    assert all(p.grad is None for p in parameters)
