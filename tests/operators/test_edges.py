"""Losses without curvature, and evaluations that cannot be differentiated: a zero, or one sentence with the remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_curvature.operators import (
    GaussNewtonOperator,
    GradientDifferenceOperator,
    HessianOperator,
    MicroBatch,
    SecondMomentOperator,
    micro_batches,
)
from lightning_curvature.operators.micro_batches import Evaluation
from tests.helpers.operators import CASES

X = torch.arange(12.0, dtype=torch.float64).reshape(4, 3)
Y = torch.full((4, 2), 50.0, dtype=torch.float64)


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2).double()


def absolute(z: Tensor, y: Tensor) -> Tensor:
    return (z - y).abs().mean()


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("loss", [F.l1_loss, absolute, lambda z, y: z.mean()], ids=["l1_loss", "abs", "linear"])
@pytest.mark.parametrize("kind", [HessianOperator, GaussNewtonOperator])
def test_a_piecewise_linear_loss_has_a_product_of_zero(kind: Any, loss: Callable[..., Tensor], keep: bool) -> None:
    operator = kind.of(linear(), loss, [(X, Y), (X[:1], Y[:1])], keep_graph=keep)
    for _ in range(2):
        product = operator(torch.ones(8, dtype=torch.float64))
        assert product.shape == (8,)
        assert not product.any()


def test_a_piecewise_linear_network_has_the_curvature_of_its_loss() -> None:
    # One sample with active and inactive units: H of the squared error is 2 ∇z∇zᵀ, whatever the kinks.
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)).double()
    x, y = X[1:2] / 10.0, Y[:1, :1]
    outputs = network(x)
    jacobian = torch.cat([g.reshape(-1) for g in torch.autograd.grad(outputs, list(network.parameters()))])
    v = torch.linspace(-1.0, 1.0, len(jacobian), dtype=torch.float64)
    found = GaussNewtonOperator.of(network, F.mse_loss, [(x, y)])(v)
    assert torch.allclose(found, 2.0 * jacobian * (jacobian @ v), rtol=1e-13, atol=0.0)


CONSTANT = (
    r"^the loss must depend on the parameters, got a constant: compute it with gradients enabled, without detach and "
    r"outside of no_grad and inference_mode\.$"
)
MISSING = (
    r"^outputs must come with the loss, in its graph, got none: compute them by calling self\(…\) exactly once, or "
    r"name the submodule that makes them, outputs='head'\.$"
)
BYPASSED = (
    r"^the loss must be computed from the outputs, got outputs that it does not depend on: return those that go into "
    r"the loss\.$"
)


def one_part(kind: Any, evaluate: Callable[[nn.Linear], Evaluation]) -> Callable[[], Tensor]:
    network = linear()
    options = {"lr": 0.1} if kind is SecondMomentOperator else {}
    operator = kind([MicroBatch(lambda: evaluate(network), 1.0)], list(network.parameters()), **options)
    return lambda: operator(torch.ones(8, dtype=torch.float64))


@pytest.mark.parametrize(
    "kind", [HessianOperator, GaussNewtonOperator, SecondMomentOperator, GradientDifferenceOperator]
)
def test_a_constant_loss_is_said_to_be_one(kind: Any) -> None:
    product = one_part(kind, lambda network: Evaluation(network(X).mean().detach(), network(X)))
    with pytest.raises(ValueError, match=CONSTANT):
        product()


@pytest.mark.parametrize(
    "kind", [HessianOperator, GaussNewtonOperator, SecondMomentOperator, GradientDifferenceOperator]
)
def test_a_loss_of_other_parameters_has_a_product_of_zero(kind: Any) -> None:
    # A mixture of experts whose trained ones saw nothing of a micro-batch: no error, and no curvature.
    other = linear()

    def evaluate(network: nn.Linear) -> Evaluation:
        outputs = other(X)
        return Evaluation(outputs.square().mean(), outputs)

    assert torch.equal(one_part(kind, evaluate)(), torch.zeros(8, dtype=torch.float64))


@pytest.mark.parametrize(
    ("evaluate", "sentence"),
    [
        (lambda network: Evaluation(network(X).mean()), MISSING),
        (lambda network: Evaluation(network(X).mean(), network(X).detach()), MISSING),
        (lambda network: Evaluation(network(X).square().mean(), network(X)), BYPASSED),
    ],
    ids=["none", "detached", "other outputs"],
)
def test_gauss_newton_needs_the_outputs_of_the_loss(evaluate: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        one_part(GaussNewtonOperator, evaluate)()


def test_a_network_of_which_some_data_uses_nothing() -> None:
    # A mixture whose second expert sees none of the first batch: what the batches do not use has no curvature there.
    first, second = linear(), linear()
    parameters = [*first.parameters(), *second.parameters()]

    def part(expert: nn.Linear, weight: float) -> MicroBatch:
        return MicroBatch(lambda: Evaluation(F.mse_loss(z := expert(X), Y), z), weight)

    v = torch.linspace(-1.0, 1.0, 16, dtype=torch.float64)
    both = HessianOperator([part(first, 0.25), part(second, 0.75)], parameters)(v)
    alone = [HessianOperator.of(linear(), F.mse_loss, [(X, Y)])(piece) for piece in v.split(8)]
    assert torch.allclose(both, torch.cat([0.25 * alone[0], 0.75 * alone[1]]), rtol=1e-13, atol=0.0)


def test_no_data_and_no_parameters() -> None:
    with pytest.raises(
        ValueError, match=r"^batches must be a non-empty sequence of pairs, got \[\]: give a list of \(inp"
    ):
        micro_batches(linear(), F.mse_loss, [])
    with pytest.raises(ValueError, match=r"^parameters must be a non-empty sequence of real tensors, got \[\]: give"):
        HessianOperator.of(linear().requires_grad_(False), F.mse_loss, [(X, Y)])


def test_keep_graph_has_three_values() -> None:
    case = CASES["perceptron"]
    with pytest.raises(ValueError, match=r"^keep_graph must be True, False or 'auto', got 'maybe': 'auto' keeps what"):
        HessianOperator.of(case.network(), case.loss, case.data(4), keep_graph="maybe")
