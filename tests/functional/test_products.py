"""Exact products with the Hessian against the dense matrix."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from lightning_curvature.functional import hessian_quadratic_form
from lightning_curvature.functional.products import differentiable_gradients
from tests.helpers.once import OnceSquare, OnceSum
from tests.helpers.runs import mlp


def test_equals_the_dense_hessian() -> None:
    network = mlp(4, 5, 3)
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(6, 4, generator=g).double(), torch.randint(3, (6,), generator=g)
    parameters = dict(network.named_parameters())
    direction = [torch.randn(p.shape, generator=g).double() for p in parameters.values()]
    flat = torch.cat([p.detach().reshape(-1) for p in parameters.values()])
    d = torch.cat([t.reshape(-1) for t in direction])

    def loss_at(theta: torch.Tensor) -> torch.Tensor:
        pieces = theta.split([p.numel() for p in parameters.values()])
        values = {n: piece.reshape(p.shape) for (n, p), piece in zip(parameters.items(), pieces, strict=True)}
        return F.cross_entropy(functional_call(network, values, (x,)), y)

    descent = (torch.autograd.functional.jacobian(loss_at, flat) @ d).item()
    quadratic = (d @ torch.autograd.functional.hessian(loss_at, flat) @ d).item()
    found = hessian_quadratic_form(F.cross_entropy(network(x), y), list(parameters.values()), direction)
    # A few hundred float64 products of numbers of one size, some of them cancelling.
    assert found[0].item() == pytest.approx(descent, rel=1e-12)
    assert found[1].item() == pytest.approx(quadratic, rel=1e-12)
    assert not found[0].requires_grad
    assert not found[1].requires_grad
    assert all(p.grad is None for p in parameters.values())


def test_parameters_outside_the_graph_count_as_constants() -> None:
    x, unused = (torch.tensor([2.0], dtype=torch.float64, requires_grad=True) for _ in range(2))
    ones = [torch.ones(1).double()] * 2
    assert [v.item() for v in hessian_quadratic_form((x**3).sum(), [x, unused], ones)] == [12.0, 12.0]


def test_a_linear_loss_has_no_curvature() -> None:
    x, z = (torch.tensor([2.0], requires_grad=True) for _ in range(2))
    ones = [torch.ones(1)] * 2
    assert [v.item() for v in hessian_quadratic_form((3.0 * x).sum(), [x], ones[:1])] == [3.0, 0.0]
    # The graph of the gradient exists but leads to z alone.
    assert [v.item() for v in hessian_quadratic_form((3.0 * x + z**2).sum(), [x, z], ones)] == [7.0, 2.0]
    assert [v.item() for v in hessian_quadratic_form((x * z).sum(), [x], ones[:1])] == [2.0, 0.0]


def test_float32_products_are_summed_in_float64() -> None:
    """One large term beside 2¹² small ones, each below half a unit of it in float32: all would be lost."""
    n = 2**12
    x = torch.ones(n + 1, requires_grad=True)
    scale = torch.full((n + 1,), 2.0**-26)
    scale[0] = 1.0
    descent, quadratic = hessian_quadratic_form((0.5 * scale * x**2).sum(), [x], [torch.ones(n + 1)])
    assert descent.item() == quadratic.item() == 1.0 + n * 2.0**-26


@pytest.mark.parametrize(
    ("loss", "sentence"),
    [
        (torch.ones(()), "loss must depend on the parameters, got a constant: compute it with gradients enabled"),
        (torch.ones((), requires_grad=True) * 2.0, "got none of them in its graph: check the list"),
    ],
)
def test_a_loss_without_the_parameters_is_explained(loss: torch.Tensor, sentence: str) -> None:
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match=sentence):
        hessian_quadratic_form(loss, [x], [torch.ones(2)])


@pytest.mark.parametrize(
    "loss",
    [
        OnceSum.apply,  # its backward gets a constant: nothing is left of it in the graph of the gradient
        lambda x: OnceSum.apply(x.sin()),
        lambda x: OnceSquare.apply(x).square().sum(),
        lambda x: x.square().sum() + 1e-3 * OnceSum.apply(x),
    ],
    ids=["a loss", "a loss of a function", "a function inside", "one term of two"],
)
def test_functions_that_are_differentiable_once_are_noticed(loss: Any) -> None:
    x = torch.linspace(0.5, 1.5, 3, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match="differentiate twice a function that was marked with @once_differentiable"):
        hessian_quadratic_form(loss(x), [x], [torch.ones(3, dtype=torch.float64)])


def test_those_beside_the_parameters_do_not_matter() -> None:
    x, y = (torch.linspace(0.5, 1.5, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    found = hessian_quadratic_form((x**3).sum() + OnceSum.apply(y), [x], [torch.ones(3, dtype=torch.float64)])
    assert [v.item() for v in found] == pytest.approx([3.0 * float(x.square().sum()), 6.0 * float(x.sum())], rel=1e-14)


def test_those_between_are_noticed_also_from_a_tensor_that_is_no_leaf() -> None:
    x = torch.linspace(0.5, 1.5, 3, requires_grad=True)
    hidden = x.sin()
    with pytest.raises(RuntimeError, match="once_differentiable"):
        differentiable_gradients(OnceSum.apply(hidden), [hidden])
    (gradient,) = differentiable_gradients(OnceSum.apply(x) + hidden.square().sum(), [hidden])
    assert torch.equal(gradient.detach(), 2.0 * hidden.detach())  # type: ignore[union-attr]


def test_a_function_that_is_differentiable_twice_may_be_decorated() -> None:
    class Twice(torch.autograd.Function):
        @staticmethod
        @torch.amp.custom_fwd(device_type="cpu")
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.square().sum()

        @staticmethod
        @torch.amp.custom_bwd(device_type="cpu")
        def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
            return 2.0 * ctx.saved_tensors[0] * gradient

    x = torch.ones(2, requires_grad=True)
    assert [v.item() for v in hessian_quadratic_form(Twice.apply(x), [x], [torch.ones(2)])] == [4.0, 4.0]
