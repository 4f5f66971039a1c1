"""Derivatives of sample losses by the output of a linear layer, against dense second derivatives in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_curvature.operators import linear_statistics
from lightning_curvature.operators.linear_layer import NotSeparableError

SAMPLES = 5
X = torch.randn(SAMPLES, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.tensor([0, 2, 1, 1, 0])
# Products of a few dozen terms: hundreds of roundings of 1e-16.
EXACT = {"rtol": 1e-12, "atol": 1e-14}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()


def mean_loss(model: nn.Module) -> Callable[[], Tensor]:
    return lambda: F.cross_entropy(model(X), Y)


@pytest.mark.parametrize("place", [0, 2])
def test_statistics_of_each_sample(place: int) -> None:
    model = network()
    layer: Any = model[place]
    found = linear_statistics(layer, mean_loss(model), SAMPLES, check=True)
    for index in range(SAMPLES):
        before = model[:place](X[index : index + 1])[0].detach()

        def loss(z: Tensor, index: int = index) -> Tensor:
            return F.cross_entropy(model[place + 1 :](z[None]), Y[index : index + 1])

        z = F.linear(before, layer.weight, layer.bias).detach()
        torch.testing.assert_close(found.activations[index], before, **EXACT)
        torch.testing.assert_close(found.gradients[index], torch.func.grad(loss)(z).detach(), **EXACT)
        torch.testing.assert_close(found.curvatures[index], torch.func.hessian(loss)(z).detach(), **EXACT)


@pytest.mark.parametrize("place", [0, 2])
def test_means_are_those_of_the_weight(place: int) -> None:
    model = network()
    layer: Any = model[place]
    found = linear_statistics(layer, mean_loss(model), SAMPLES)
    names = f"{place}.weight"

    def loss(weight: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, {names: weight}, X), Y)

    weight = layer.weight.detach()
    torch.testing.assert_close(found.mean_gradient(), torch.func.grad(loss)(weight).detach(), **EXACT)
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    hessian = torch.func.hessian(loss)(weight).detach()
    product = torch.einsum("abcd,cd->ab", hessian, direction)
    torch.testing.assert_close(found.mean_product(direction), product, **EXACT)


def test_the_part_before_the_layer_is_not_differentiated_and_nothing_is_left() -> None:
    model = network()
    passes: list[str] = []
    model[0].weight.register_hook(lambda g: passes.append("first"))  # type: ignore[union-attr]
    linear_statistics(model[2], mean_loss(model), SAMPLES)  # type: ignore[arg-type]
    assert passes == []
    assert "forward" not in vars(model[2])
    assert all(p.grad is None for p in model.parameters())


class Twice(nn.Module):
    """Calls its layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x))


def test_layers_that_are_not_called_once_with_a_row_for_each_sample() -> None:
    twice, model = Twice(), network()
    with pytest.raises(NotSeparableError, match="the layer is called 2 times for a batch"):
        linear_statistics(twice.layer, lambda: twice(X).square().mean(), SAMPLES)
    with pytest.raises(NotSeparableError, match="the layer is called 0 times for a batch"):
        linear_statistics(nn.Linear(4, 3), mean_loss(model), SAMPLES)
    with pytest.raises(NotSeparableError, match=r"the layer gets inputs of shape \(5, 4\) for 4 samples"):
        linear_statistics(model[0], mean_loss(model), SAMPLES - 1)  # type: ignore[arg-type]
    assert "forward" not in vars(model[0])


def test_losses_that_do_not_depend_on_the_layer() -> None:
    model = network()
    with pytest.raises(ValueError, match="the loss must depend on the parameter, got a constant"):
        linear_statistics(model[0], lambda: mean_loss(model)().detach(), SAMPLES)  # type: ignore[arg-type]
    beside = nn.Linear(4, 1).double()
    with pytest.raises(ValueError, match="the loss must depend on the parameter, got one that does not"):
        linear_statistics(beside, lambda: (beside(X), mean_loss(model)())[1], SAMPLES)


@pytest.mark.parametrize(
    ("extra", "name"),
    [
        # The weight decays; and the variance over samples joins what the mean keeps apart.
        (lambda layer, z: layer.weight.square().sum(), "gradient"),
        (lambda layer, z: z.var(0).sum(), "Hessian"),
    ],
)
def test_the_check_finds_what_is_not_separable(extra: Any, name: str) -> None:
    layer = nn.Linear(4, 3).double()

    def loss() -> Tensor:
        z = layer(X)
        return F.cross_entropy(z, Y) + extra(layer, z)

    linear_statistics(layer, loss, SAMPLES)  # which nobody asked to check
    with pytest.raises(NotSeparableError, match=f"the {name} of the weight is another than that of z = W a"):
        linear_statistics(layer, loss, SAMPLES, check=True)
