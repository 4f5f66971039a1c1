"""Exact products with the Hessian against the dense matrix."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from lightning_curvature.functional import hessian_quadratic_form
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
