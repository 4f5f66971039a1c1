"""C, H and E[h²] of a block against dense derivatives of single samples, by either route, and which route is taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

from tests.helpers.noise import (
    BATCH,
    TEN,
    Plain,
    assert_close,
    assert_matrices,
    dense,
    evaluated,
    images,
    module_of,
    network,
    samples,
    squared,
)
from tests.helpers.setups import Tied
from tests.oracles.dense import Loss


@pytest.mark.parametrize("loss", [F.cross_entropy, squared])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
@pytest.mark.parametrize("name", ["0.weight", "2.weight"])
@pytest.mark.thinned(6)
def test_both_routes(name: str, activation: type[nn.Module], bias: bool, loss: Loss) -> None:
    module = module_of(network(activation, bias), loss)
    expected, found = dense(module, name), evaluated(module, name)
    assert found.route == "kronecker"
    assert_matrices(found, expected, BATCH)
    place = int(name[0])
    module.network[place] = Plain(module.network[place])
    general = evaluated(module, name)
    assert general.route == "general"
    assert_matrices(general, expected, BATCH)
    # And directly, where the eigenvectors are those of one Hessian.
    assert_close(general.curvatures, found.curvatures)


def tokens() -> TensorDataset:
    torch.manual_seed(2)
    return TensorDataset(torch.randint(0, 7, (TEN, 4)), torch.randint(0, 3, (TEN,)))


class Mean(nn.Module):
    """Over time."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.layer(x).tanh()).tanh())


class Attentive(nn.Module):
    """Its projections are called by their weights, not as layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(4, 3)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        return self.head(self.attention(x, x, x)[0].mean(1))


class Several(nn.Linear):
    """Returns more than its output, or takes more than its input, or uses its weight in a way of its own."""

    def __init__(self, kind: str) -> None:
        super().__init__(4, 5)
        self.kind = kind

    def forward(self, x: Tensor, scale: float = 1.0) -> Any:
        z = super().forward(x) * scale
        return (z, x) if self.kind == "returns" else z + F.linear(x, self.weight**2) if self.kind == "squares" else z


class OfSeveral(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer, self.head, self.kind = Several(kind), nn.Linear(5, 3), kind

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer(x, 0.5) if self.kind == "takes" else self.layer(x)
        return self.head((z[0] if self.kind == "returns" else z).tanh())


class ByName(nn.Module):
    """Calls its layer with a named argument."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(input=x).tanh())


class Checkpointed(nn.Module):
    """Recomputes, with fused attention, whatever is not kept."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.fused = True  # which the oracle switches off

    def attend(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        x = F.scaled_dot_product_attention(x, x, x) if self.fused else torch.softmax(x @ x.mT / 2.0, -1) @ x
        return self.layer(x.mean(1)).tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.attend, x, use_reentrant=False) if self.fused else self.attend(x))


USES = (
    "the gradient of the weight is another than that of z = W a: the weight is used elsewhere, or samples see each ot"
)
NO_LINEAR = "it is no weight of a torch.nn.Linear"
LAYERS: dict[str, tuple[Callable[[], nn.Module], str, Callable[[], TensorDataset], str]] = {
    "bias": (network, "0.bias", samples, NO_LINEAR),
    "norm": (lambda: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)), "1.weight", samples, NO_LINEAR),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3)),
        "0.weight",
        images,
        NO_LINEAR,
    ),
    "after convolutions": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2, 3)),
        "4.weight",
        images,
        "",
    ),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(7, 3), nn.Flatten(), nn.Linear(12, 3)),
        "0.weight",
        tokens,
        NO_LINEAR,
    ),
    "sequence": (
        lambda: nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 5), nn.Tanh(), Mean(), nn.Linear(5, 3)),
        "1.weight",
        tokens,
        "the layer gets inputs of shape (8, 4, 4) for 8 samples",
    ),
    "tied weights": (Tied, "first.weight", samples, USES),
    "used twice": (Twice, "layer.weight", samples, "the layer is called 2 times for a batch"),
    "attention": (Attentive, "attention.out_proj.weight", tokens, "the layer is called 0 times for a batch"),
    "returns more": (
        lambda: OfSeveral("returns"),
        "layer.weight",
        samples,
        "the layer is no map of one tensor to another",
    ),
    "takes more": (lambda: OfSeveral("takes"), "layer.weight", samples, "the layer is no map of one tensor to another"),
    "uses more": (lambda: OfSeveral("squares"), "layer.weight", samples, USES),
    "called by name": (ByName, "layer.weight", samples, ""),
    "checkpointed": (Checkpointed, "layer.weight", tokens, ""),
    "checkpointed, before it": (Checkpointed, "embedding.weight", tokens, NO_LINEAR),
}


@pytest.mark.parametrize("case", LAYERS)
@pytest.mark.thinned(5)
def test_any_parameter(case: str, informed: Callable[[], list[str]]) -> None:
    make, name, data, why = LAYERS[case]
    torch.manual_seed(0)
    module = module_of(make().double())
    found = evaluated(module, name, data(), on_error="warn")
    assert_matrices(found, dense(module, name, data()), BATCH)
    assert found.route == ("general" if why else "kronecker")
    (said,) = informed()
    assert said.startswith(
        f"noise covariance of 'network.{name}': {found.route.capitalize() if not why else 'general'} "
    )
    assert why in said
