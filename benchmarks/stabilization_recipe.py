"""The source's plain procedure for stabilization: deflated power iteration, products with both Hessians."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from timing import Clock
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from workloads import Batch, loss_of

ITERATIONS, TOLERANCE = 30, 1e-4


@dataclass
class Recipe:
    """What the procedure gave, in the units of the criterion.

    Attributes:
        basis: U as rows, (D, N).
        values: criterion by estimator.
        seconds: by stage.
        products: Hessian–vector products, each with all samples of its mean.
    """

    basis: Tensor
    values: dict[str, float]
    seconds: dict[str, float]
    products: dict[str, int]


def flat_product(module: nn.Module, batch: Batch, parameters: list[nn.Parameter]) -> Callable[[Tensor], Tensor]:
    """V ↦ Hv by double backward, the graph built anew each time."""

    def product(vector: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            gradients = torch.autograd.grad(loss_of(module, batch), parameters, create_graph=True)
            flat = torch.cat([g.reshape(-1) for g in gradients])
            return torch.cat([g.reshape(-1) for g in torch.autograd.grad(flat @ vector, parameters)])

    return product


def power_iteration(
    product: Callable[[Tensor], Tensor], size: int, count: int, device: torch.device
) -> tuple[Tensor, list[float], int]:
    """Eigenvectors of the largest magnitude, one after the other, those found deflated; and the number of products."""
    generator = torch.Generator(device).manual_seed(0)
    vectors, values, made = [], [], 0
    for _ in range(count):
        v = torch.randn(size, generator=generator, device=device)
        v /= v.norm()
        value = None
        for _ in range(ITERATIONS):
            w = product(v)
            made += 1
            for known, own in zip(vectors, values, strict=True):
                w -= own * (known @ v) * known
            new = float(w @ v)
            v = w / w.norm()
            if value is not None and abs(new - value) <= TOLERANCE * abs(new):
                break
            value = new
        vectors.append(v)
        values.append(new)
    return torch.stack(vectors), values, made


def recipe(
    module: nn.Module, first: Batch, both: Batch, dimension: int, sigma: float, draws: int, clock: Clock
) -> Recipe:
    """Measure Δ₂^(D) with all three estimators.

    Args:
        module: the network.
        first: the k samples.
        both: these and the new one.
        dimension: D.
        sigma: σ.
        draws: S.
        clock: the clock.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    size, device = sum(p.numel() for p in parameters), parameters[0].device
    seconds, times = {}, [clock.now()]

    def lap(stage: str) -> None:
        times.append(clock.now())
        seconds[stage] = times[-1] - times[-2]

    before, after = (flat_product(module, batch, parameters) for batch in (first, both))
    basis, _, made = power_iteration(before, size, dimension, device)
    lap("subspace")

    gradients = []
    for batch in (first, both):
        found = torch.autograd.grad(loss_of(module, batch), parameters)
        gradients.append(torch.cat([g.reshape(-1) for g in found]))
    with torch.no_grad():
        a = float(loss_of(module, both) - loss_of(module, first))
    c = basis @ (gradients[1] - gradients[0])
    b = torch.stack([basis @ (after(u) - before(u)) for u in basis])
    lap("coefficients")

    generator = torch.Generator(device).manual_seed(1)
    z = sigma * torch.randn(draws, dimension, generator=generator, device=device)
    total = 0.0
    kept = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for row in z:
            move = row @ basis
            for p, old, part in zip(parameters, kept, move.split([p.numel() for p in parameters]), strict=True):
                p.copy_(old + part.view_as(p))
            total += float(loss_of(module, both) - loss_of(module, first)) ** 2
        for p, old in zip(parameters, kept, strict=True):
            p.copy_(old)
    lap("direct")

    quadratic = float((a + z @ c + 0.5 * torch.einsum("sd,de,se->s", z, b, z)).square().mean())
    lap("quadratic")
    trace, square = float(b.trace()), float((b * b.T).sum())
    moment = a**2 + a * sigma**2 * trace + sigma**2 * float(c @ c) + sigma**4 / 4 * (2 * square + trace**2)
    lap("gaussian_moment")
    return Recipe(
        basis,
        {"direct": total / draws, "quadratic": quadratic, "gaussian_moment": moment},
        seconds,
        {"subspace": made, "coefficients": 2 * dimension},
    )
