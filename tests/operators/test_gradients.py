"""The gradient that an operator gives beside its products: its value, what it costs, sums over ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_curvature.operators import CurvatureOperator, GaussNewtonOperator, HessianOperator, MicroBatch
from lightning_curvature.operators import micro_batches as micro_batches_of
from lightning_curvature.operators.micro_batches import Evaluation
from tests.helpers.operators import CASES, INDEPENDENT, Counter, off, on_ranks, rounding, trained
from tests.oracles.matrices import Matrices

KINDS = [HessianOperator, GaussNewtonOperator]
WITH_PLAIN = [*KINDS, CurvatureOperator]
SIZES = (3, 3, 2, 1, 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", WITH_PLAIN)
def test_value(kind: Any, name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    network, data = case.network(dtype), case.data(8, 2, dtype=dtype)
    # Before the operator: in training mode each forward moves the running statistics.
    truth = Matrices(network, case.loss).gradient(data)
    found = kind.of(network, case.loss, data).gradient()
    assert found.dtype == dtype
    assert not found.requires_grad
    assert off(found, truth) < rounding(dtype)


@pytest.mark.parametrize("name", INDEPENDENT)
@pytest.mark.parametrize("kind", KINDS)
def test_ragged_micro_batches_are_one_batch(kind: Any, name: str) -> None:
    case = CASES[name]
    network = case.network()
    whole = kind.of(network, case.loss, case.data(10)).gradient()
    assert off(kind.of(network, case.loss, case.data(*SIZES)).gradient(), whole) < rounding(torch.float64)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_with_and_without_kept_graphs_before_and_after_a_product(kind: Any, name: str) -> None:
    case = CASES[name]
    network, data = case.network(), case.data(3, 3, 2)
    found, products = [], []
    for keep in (True, False, "auto"):
        operator = kind.of(network, case.loss, data, keep_graph=keep)
        first = operator.gradient()
        products.append(operator(first))
        found += [first, operator.gradient()]
        assert first.data_ptr() != found[-1].data_ptr()
    assert all(torch.equal(gradient, found[0]) for gradient in found)
    assert all(torch.equal(product, products[0]) for product in products)


@pytest.mark.parametrize(
    ("keep", "sizes", "counts"),
    [
        (True, SIZES, [5, 5, 5, 5]),
        ("auto", SIZES, [5, 5, 5, 5]),
        (False, SIZES, [5, 10, 15, 20]),
        (False, (10,), [1, 1, 1, 1]),  # the only graph is alive in every product
    ],
    ids=["kept", "auto", "not kept", "one micro-batch"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_forwards_of_gradients_and_products(kind: Any, keep: Any, sizes: tuple[int, ...], counts: list[int]) -> None:
    case = CASES["perceptron"]
    network = case.network()
    counter, found = Counter(network), []
    operator = kind.of(network, case.loss, case.data(*sizes), keep_graph=keep)
    for wanted in (operator.gradient, lambda: operator(operator.space.zeros() + 1.0)) * 2:
        wanted()
        found.append(counter.count)
    assert found == counts


def test_the_plain_gradient_takes_a_forward_a_micro_batch_and_keeps_none() -> None:
    case = CASES["perceptron"]
    network = case.network()
    counter = Counter(network)
    operator = CurvatureOperator.of(network, case.loss, case.data(*SIZES))
    first = operator.gradient()
    assert torch.equal(operator.gradient(), first)
    assert counter.count == 10


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_follow_the_parameters(kind: Any) -> None:
    case = CASES["perceptron"]
    network, data = case.network(), case.data(8, 2)
    operator = kind.of(network, case.loss, data, keep_graph=True)
    before = operator.gradient()
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(0.5)
    truth = Matrices(network, case.loss).gradient(data)
    assert off(operator.gradient(), truth) < rounding(torch.float64) < off(before, truth)


@pytest.mark.parametrize("kind", WITH_PLAIN)
def test_gradients_of_parameters_and_modes_are_left_alone(kind: Any) -> None:
    case = CASES["odd"]
    network, data = case.network(), case.data(8, 2)
    for p in trained(network)[::2]:
        p.grad = torch.ones_like(p)
    with torch.no_grad():
        kind.of(network, case.loss, data).gradient()
        assert not torch.is_grad_enabled()
    assert [p.grad is None for p in trained(network)] == [i % 2 == 1 for i in range(len(trained(network)))]
    assert all(bool((p.grad == 1.0).all()) for p in trained(network)[::2])


@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_pass_through_the_outputs_is_in_the_gradient(kind: Any) -> None:
    case = CASES["perceptron"]
    network, ((x, y),) = case.network(), case.data(10)

    def evaluate() -> Evaluation:
        z = network(x)
        return Evaluation(case.loss(z, y) + 0.05 * sum((p**4).sum() for p in network.parameters()), z)

    matrices = Matrices(network, case.loss)
    truth = matrices.gradient([(x, y)]) + 0.2 * matrices.theta**3
    found = kind([MicroBatch(evaluate, 1.0)], trained(network)).gradient()
    assert off(found, truth) < rounding(torch.float64)


@pytest.mark.parametrize("shares", [[[0, 2], [1, 3]], [[0], [1, 2, 3]], [[3], [0, 1], [2]]])
@pytest.mark.parametrize("kind", WITH_PLAIN)
def test_ranks_sum_to_the_gradient_of_one_process(kind: Any, shares: list[list[int]]) -> None:
    case = CASES["perceptron"]
    network = case.network()
    parts = micro_batches_of(network, case.loss, case.data(4, 2, 1, 3))
    alone = kind(parts, trained(network)).gradient()

    def job(rank: int, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        return kind([parts[i] for i in shares[rank]], trained(network), reduce=reduce).gradient()

    found = on_ranks(len(shares), job)
    assert all(torch.equal(gradient, found[0]) for gradient in found)
    # The same sums in another order.
    assert off(found[0], alone) < rounding(torch.float64)


@pytest.mark.parametrize("kind", WITH_PLAIN)
def test_a_rank_that_fails_leaves_none_waiting(kind: Any) -> None:
    case = CASES["perceptron"]
    network = case.network()
    good, bad = micro_batches_of(network, case.loss, case.data(8, 2))
    failing = MicroBatch(lambda: 1 / 0, bad.weight)  # type: ignore[arg-type, return-value]

    def job(rank: int, reduce: Callable[[Tensor], Tensor]) -> tuple[Tensor, Exception | None]:
        operator = kind([[good], [failing]][rank], trained(network), reduce=reduce)
        return operator.gradient(), operator.error

    (first, none), (second, error) = on_ranks(2, job)
    assert first.isnan().all()
    assert second.isnan().all()
    assert none is None
    assert isinstance(error, ZeroDivisionError)


@pytest.mark.parametrize("kind", WITH_PLAIN)
def test_a_loss_without_a_graph_is_refused(kind: Any) -> None:
    network = nn.Linear(2, 1)
    constant = MicroBatch(lambda: Evaluation(torch.ones(()), torch.ones(1, 1)), 1.0)
    with pytest.raises(ValueError, match=r"^the loss must depend on the parameters, got a constant: compute it with"):
        kind([constant], list(network.parameters())).gradient()
