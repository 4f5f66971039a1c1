"""Methods that compute gᵀHg and ‖g‖² of mini-batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from spectrum_nets import Batch, Net
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_curvature.operators import HessianOperator, MiniBatch

Values = list[tuple[float, float]]


@dataclass(frozen=True)
class Recipe:
    """A way to compute them.

    Attributes:
        measure: gᵀHg and ‖g‖² of each mini-batch.
    """

    measure: Callable[[Net, Sequence[Batch]], Values]


def _ours(net: Net, batches: Sequence[Batch]) -> Values:
    values = []
    for batch in batches:
        with closing(MiniBatch(HessianOperator.of(net.rows, F.cross_entropy, [batch]))) as one:
            values.append((one.self_curvature, one.squared_norm))
    return values


def _pairs(net: Net, batches: Sequence[Batch]) -> Values:
    values = []
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        with (
            closing(MiniBatch(HessianOperator.of(net.rows, F.cross_entropy, [first]))) as one,
            closing(MiniBatch(HessianOperator.of(net.rows, F.cross_entropy, [second]))) as other,
        ):
            values += [(batch.self_curvature, batch.squared_norm) for batch in (one, other)]
            one.curvature_along(other.gradient)
            other.curvature_along(one.gradient)
    return values


def _plain(net: Net, batches: Sequence[Batch]) -> Values:
    values = []
    for x, y in batches:
        with sdpa_kernel(SDPBackend.MATH):
            gradients = torch.autograd.grad(F.cross_entropy(net.rows(x), y), net.parameters, create_graph=True)
            flat = torch.cat([g.reshape(-1) for g in gradients])
            vector = flat.detach()
            product = torch.autograd.grad(flat @ vector, net.parameters)
        curved = torch.cat([h.reshape(-1) for h in product])
        values.append((float(vector @ curved), float(vector @ vector)))
    return values


def _vmap(net: Net, batches: Sequence[Batch]) -> Values:
    parameters = {name: p.detach() for name, p in net.rows.named_parameters()}

    def loss(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(net.rows, values, (x,)), y)

    def of_batch(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        gradient = grad(loss)(parameters, x, y)

        def along(values: dict[str, Tensor]) -> Tensor:
            own = grad(loss)(values, x, y)
            return torch.stack([(own[name] * gradient[name]).sum() for name in own]).sum()

        product = grad(along)(parameters)
        curvature = torch.stack([(product[name] * g).sum() for name, g in gradient.items()]).sum()
        return curvature, torch.stack([g.square().sum() for g in gradient.values()]).sum()

    with sdpa_kernel(SDPBackend.MATH):
        found = vmap(of_batch)(torch.stack([x for x, _ in batches]), torch.stack([y for _, y in batches]))
    return list(zip(*(part.tolist() for part in found), strict=True))


def _limit(net: Net, batches: Sequence[Batch]) -> Values:
    values = []
    for x, y in batches:
        with sdpa_kernel(SDPBackend.MATH):
            gradients = torch.autograd.grad(F.cross_entropy(net.rows(x), y), net.parameters, create_graph=True)
            vectors = [g.detach() for g in gradients]
            products = torch.autograd.grad(gradients, net.parameters, vectors)
        curvature = sum(torch.linalg.vecdot(h.flatten(), v.flatten()) for h, v in zip(products, vectors, strict=True))
        values.append((float(curvature), float(sum(v.square().sum() for v in vectors))))
    return values


RECIPES = {
    "ours": Recipe(_ours),
    "ours, pair": Recipe(_pairs),
    "plain recipe": Recipe(_plain),
    "vmap": Recipe(_vmap),
    "limit": Recipe(_limit),
}
