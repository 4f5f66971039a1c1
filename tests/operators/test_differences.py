"""Products by a difference of gradients: how near they are, and that the parameters come back bit for bit."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_curvature.distributed.gathers import Gathers
from lightning_curvature.linalg import VectorSpace, eigenpairs
from lightning_curvature.operators import (
    GradientDifferenceOperator,
    HessianOperator,
    MicroBatch,
    PreconditionedOperator,
    Sharding,
    differences,
    micro_batches,
)
from lightning_curvature.operators.differences import DifferenceHistory
from lightning_curvature.operators.micro_batches import Evaluation
from tests.helpers.operators import CASES, Data, trained
from tests.oracles.matrices import Matrices

# At the usual distance r = u^{1/3} ‖θ‖/10, or a better one: θ ± r v rounds by about 0.2 u |θ_i|, which turns v by
# √2 · 0.2 u ‖θ‖/2r = 1.4 u^{2/3}, of its length; the roundings of the gradients, a few u of the terms that cancel in
# them, over 2r are a few times as much, and along the sharpest direction the truncation of up to 6 u^{2/3} is added.
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
@pytest.mark.thinned(3)
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

    operator = GradientDifferenceOperator([MicroBatch(evaluate, 1.0)], [weight], history=DifferenceHistory(0.1))
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


def bending(within: float) -> tuple[MicroBatch, nn.Parameter, Tensor]:
    """A loss of cosines that bends within a length, at a point of length 1, and its second derivatives."""
    weight = nn.Parameter(torch.linspace(-1.0, 1.0, 64) / torch.linspace(-1.0, 1.0, 64).norm())
    bend = torch.linspace(1.0, 2.0, 64)
    part = MicroBatch(lambda: Evaluation((bend * (1.0 - torch.cos(weight / within)) * within**2).sum()), 1.0)
    return part, weight, bend.double() * torch.cos(weight.detach().double() / within)


@pytest.mark.parametrize(("within", "usual_is_off"), [(3e-4, 1e-2), (1e-2, 1e-4), (10.0, 1e-3)])
def test_the_distance_is_that_of_the_loss(within: float, usual_is_off: float) -> None:
    """One that bends soon is differentiated over a shorter distance than one whose gradients are long beside H."""
    part, weight, exact = bending(within)
    history, g = DifferenceHistory(), torch.Generator().manual_seed(1)
    vector = torch.randn(64, generator=g)

    def off(operator: GradientDifferenceOperator) -> float:
        return float((operator(vector).double() - exact * vector).norm() / (exact * vector).norm())

    found = off(GradientDifferenceOperator([part], [weight], history=history))
    usual = off(GradientDifferenceOperator([part], [weight], history=DifferenceHistory(0.1)))
    # Of six distances, each a third of the one before, the best is at most √3 off the best of all, where the sum of r²
    # and u/r is at most twice its least: u^{2/3} of what cancels in the gradients.
    assert found < 1e-3
    assert (usual > usual_is_off) == (within == 3e-4)
    assert found < 1.5 * usual


def test_passes_of_the_first_product_and_of_the_next() -> None:
    case, passes = CASES["squared"], list[int]()
    network = case.network()
    network.register_forward_hook(lambda *args: passes.append(1))
    parts = micro_batches(network, case.loss, case.data(8, 2))
    history = DifferenceHistory()
    first = GradientDifferenceOperator(parts, trained(network), history=history)
    vector = torch.linspace(-1.0, 1.0, first.space.size, dtype=torch.float64)
    first(vector)
    # The sides at θ; a sharp direction, six distances along it, and the product itself: two passes each.
    assert len(passes) == 2 * (1 + 2 * (1 + 6 + 1))
    first(vector)
    assert len(passes) == 2 * (17 + 2)
    GradientDifferenceOperator(parts, trained(network), history=history)(vector)
    assert len(passes) == 2 * (17 + 2 + 2)  # no kinks here: nobody looks for them again


@pytest.mark.parametrize("kinked", [False, True])
def test_products_are_those_of_the_sides(kinked: bool) -> None:
    """Networks of ReLU and max pooling are as exact as smooth ones; across kinks they are off by half of H or more."""
    torch.manual_seed(0)
    bend: nn.Module = nn.ReLU() if kinked else nn.Tanh()
    network = nn.Sequential(
        nn.Linear(8, 300), bend, nn.Unflatten(1, (1, 300)), nn.MaxPool1d(2) if kinked else nn.AvgPool1d(2)
    )
    network = nn.Sequential(network, nn.Flatten(), nn.Linear(150, 3)).double()
    x, y = torch.randn(16, 8, dtype=torch.float64), torch.arange(16) % 3
    exact, single = HessianOperator.of(network, nn.functional.cross_entropy, [(x, y)]), copy.deepcopy(network).float()
    parts = micro_batches(single, nn.functional.cross_entropy, [(x.float(), y)])
    vector = torch.randn(exact.space.size, dtype=torch.float64)
    truth = exact(vector)

    def off(parts: list[MicroBatch]) -> float:
        found = GradientDifferenceOperator(parts, trained(single))(vector.float())
        return float((found.double() - truth).norm() / truth.norm())

    assert off(parts) < 1e-2
    across = off([replace(part, stepwise=None) for part in parts])
    assert (across > 0.5) == kinked


def test_sides_that_do_not_fit_are_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three micro-batches one has room: the others make one forward more a product, and give the same."""
    network, passes = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 3)).double(), list[int]()
    g = torch.Generator().manual_seed(3)
    data = [(torch.randn(8, 4, generator=g, dtype=torch.float64), torch.arange(8) % 3) for _ in range(3)]
    parts, parameters = micro_batches(network, nn.functional.cross_entropy, data), trained(network)
    vector = torch.randn(sum(p.numel() for p in parameters), generator=g, dtype=torch.float64)

    def product(bytes_free: float) -> tuple[Tensor, int]:
        monkeypatch.setattr(differences, "available_memory", lambda *args: bytes_free)
        operator = GradientDifferenceOperator(parts, parameters, history=DifferenceHistory(0.1))
        operator(vector)
        passes.clear()
        return operator(vector), len(passes)

    hook = network.register_forward_hook(lambda *args: passes.append(1))
    ample, few = product(1e9), product(4 * 8 * 64 * 1.5)  # a quarter of it, of masks of 512 bytes each
    hook.remove()
    assert (ample[1], few[1]) == (2 * 3, 2 * 3 + 2)
    # Sums over micro-batches in another order: roundings of 1e-16 over a distance of 1e-6.
    assert torch.allclose(ample[0], few[0], rtol=0.0, atol=1e-9)


def test_layers_with_other_code_without_gradients() -> None:
    """torch's encoder layer in eval mode is one fused operation there, in which no kink is seen."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(8, 2, 64, 0.0, "relu", batch_first=True)
    network = nn.Sequential(encoder, nn.Flatten(), nn.Linear(32, 3)).double().eval()
    x, y = torch.randn(64, 4, 8, dtype=torch.float64), torch.arange(64) % 3
    exact, single = HessianOperator.of(network, nn.functional.cross_entropy, [(x, y)]), copy.deepcopy(network).float()
    vector = torch.randn(exact.space.size, dtype=torch.float64)
    found = GradientDifferenceOperator.of(single, nn.functional.cross_entropy, [(x.float(), y)])(vector.float())
    truth = exact(vector)
    # As far off as that of smooth layers; across kinks it would be 1.
    assert float((found.double() - truth).norm() / truth.norm()) < 1e-2


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.thinned(2)
def test_the_error_of_an_eigenvalue_is_told(preconditioned: bool) -> None:
    told: list[bool] = []
    for name, steps in itertools.product(NAMES, (0, 5, 20)):
        case = CASES[name]
        network, data = case.network(torch.float32), case.data(8, 2, dtype=torch.float32)
        train(network, case.loss, data, steps)
        operator: Any = GradientDifferenceOperator.of(network, case.loss, data)
        matrix = Matrices(network, case.loss).hessian(data)
        if preconditioned:
            scale = torch.linspace(1.0, 4.0, len(matrix))
            operator = PreconditionedOperator(operator, operator.space.views(scale))
            matrix = matrix / (scale[:, None] * scale).sqrt()
        values = torch.linalg.eigvalsh(matrix)
        pairs = eigenpairs(operator, operator.space, largest=1, smallest=1, tolerance=1e-4)
        for found, vector, residual, value in zip(
            pairs.values.tolist(), pairs.vectors, pairs.errors.tolist(), values[[-1, 0]].tolist(), strict=True
        ):
            error = operator.uncertainty(vector, found)
            assert error < 0.02 * abs(value)  # it tells something
            told.append(abs(found - value) <= error + residual)
    assert sum(told) >= 0.9 * len(told)


def test_exact_products_have_no_such_error() -> None:
    case, passes = CASES["squared"], list[int]()
    network = case.network()
    operator = HessianOperator.of(network, case.loss, case.data(8, 2))
    network.register_forward_hook(lambda *args: passes.append(1))
    assert operator.uncertainty(operator.space.zeros() + 1.0, 1.0) == 0.0
    assert passes == []


def test_the_distance_is_measured_again_where_the_loss_has_changed() -> None:
    part, weight, exact = bending(3e-4)
    history = DifferenceHistory(1.0, error=1e-5)
    operator, vector = GradientDifferenceOperator([part], [weight], history=history), torch.ones(64)
    form = operator.quadratic_form(vector)
    off = abs(form - float(exact.sum()))
    assert operator.uncertainty(vector, form) > off > 0.1 * abs(float(exact.sum()))
    assert history.distance is None
    assert operator.quadratic_form(vector) == pytest.approx(float(exact.sum()), rel=1e-2)
    assert history.distance in (0.01, 0.03)


def test_operations_that_change_with_the_parameters_cross_their_kinks() -> None:
    """A step that makes other operations elsewhere has no sides to stay on; it is evaluated as it comes."""
    weight = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))

    def step(mode: Any = contextlib.nullcontext) -> Evaluation:
        with mode():
            moved = bool((weight.detach() != torch.tensor([1.0, 2.0])).any().item())
            return Evaluation((torch.relu(weight) if not moved else weight.abs()).square().sum())

    found = GradientDifferenceOperator([MicroBatch(step, 1.0, step)], [weight])(torch.ones(2, dtype=torch.float64))
    # A parabola: rounding alone, over a distance of 0.003 u^{1/3} or more.
    assert torch.allclose(found, torch.full((2,), 2.0, dtype=torch.float64), rtol=1e-6)


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

    parts = [watched(p) for p in micro_batches(network, case.loss, data)]
    operator = GradientDifferenceOperator(parts, parameters, history=DifferenceHistory(0.1))
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
    alone = GradientDifferenceOperator(parts, parameters, history=DifferenceHistory(0.1))
    inside: list[bool] = []

    @contextlib.contextmanager
    def around() -> Iterator[None]:
        inside.append(True)
        yield
        inside.append(False)

    def reduce(part: Tensor) -> Tensor:
        raise AssertionError("the backward of sharded parameters reduces")

    # A third round, in which this rank has nothing: its last micro-batch again, with weight 0.
    sharding = Sharding(VectorSpace(parameters), ranks=1, around=around, gathers=Gathers(network))
    sharded = GradientDifferenceOperator(
        parts, parameters, reduce=reduce, sharding=sharding, history=DifferenceHistory(0.1)
    )
    vector = torch.linspace(-1.0, 1.0, sharded.space.size, dtype=torch.float64)
    # Weights inside the gradient instead of outside: one rounding of gradients of size 1 over a distance of 1e-6.
    assert torch.allclose(sharded(vector), alone(vector), rtol=0.0, atol=1e-9)
    # One forward of each micro-batch at θ for the sides of the kinks, one pass over all of them on each side.
    assert inside == [True, False] * (len(parts) + 2)
    assert all(p.grad is None for p in parameters)
