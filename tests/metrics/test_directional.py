"""The metrics along a trajectory, in a plain PyTorch loop, and where steps and types are at an edge."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_curvature.metrics import (
    CriticalSharpness,
    DirectionalCurvature,
    FiniteDifferenceCurvature,
    GaussNewtonCurvature,
    KLCurvature,
)
from lightning_curvature.optimizers.update import ParameterUpdate
from tests.helpers.runs import mlp
from tests.oracles.dense import Part, reference
from tests.testers.metric_cases.directional import METRICS, random_updates, ratio

U64 = 2.0**-53


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Ratios of sums of a few terms of one size.
CLOSE = {"rel": 100 * U64}


def test_not_reset_it_is_the_generalized_curvature() -> None:
    """λ_gen = tr(H E[ΔθΔθᵀ]) / (gᵀE[Δθ]) of random updates Δθ at one θ, with a step size that varies."""
    g = _generator()
    root = torch.randn(6, 6, generator=g).double()
    h, gradient = root @ root.T, torch.randn(6, generator=g).double()
    updates = gradient + 0.5 * torch.randn(40, 6, generator=g).double()
    metric = DirectionalCurvature()
    for index, update in enumerate(updates):
        lr = 0.1 if index % 2 else 0.03
        d = lr * update
        metric.update(d @ h @ d, gradient @ d, lr)
    second_moment = updates.T @ updates / len(updates)
    truth = torch.trace(h @ second_moment) / (gradient @ updates.mean(0))
    # Forty terms of one size, thirty-six products each.
    assert metric.compute().item() == pytest.approx(truth.item(), rel=1000 * U64)
    # It is not the mean of the ratios.
    ratios = [(u @ h @ u / (gradient @ u)).item() for u in updates]
    assert abs(sum(ratios) / len(ratios) / truth.item() - 1.0) > 1e-3


def test_headroom_is_the_edge_over_the_curvature() -> None:
    metric = DirectionalCurvature()
    metric.update(quadratic=0.5, descent=1.0, lr=0.25)
    assert metric.headroom().item() == 4.0
    assert metric.headroom().item() == 2.0 / 0.25 / metric.compute().item()
    metric.update(quadratic=0.5, descent=1.0, lr=0.75, weight=3.0)
    mean_lr = (0.25 + 3 * 0.75) / 4
    assert metric.headroom().item() == pytest.approx(2.0 / mean_lr / metric.compute().item(), **CLOSE)
    critical = CriticalSharpness()
    critical.update(critical_factor=3.0, lr=0.1)
    assert critical.headroom().item() == pytest.approx(3.0, **CLOSE)


def test_uphill_and_lost_steps_are_nan() -> None:
    metric = DirectionalCurvature()
    metric.update(quadratic=1.0, descent=-1.0)
    assert metric.compute().isnan()
    critical = CriticalSharpness()
    critical.update(critical_factor=torch.nan, lr=0.1)
    assert critical.compute().isnan()


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_likelihood_scale_and_mask(likelihood: str) -> None:
    g = _generator()
    z, tangent = (torch.randn(5, 3, generator=g).double() for _ in range(2))
    kept = torch.tensor([True, False, True, True, False])
    metric = GaussNewtonCurvature(likelihood=likelihood, scale=2 / 3)  # type: ignore[arg-type]
    metric.update(z, tangent, descent=0.5, lr=0.1, mask=kept)
    second = torch.ones_like(z) if likelihood == "gaussian" else z.sigmoid() * (1 - z.sigmoid())
    form = (second * tangent**2).sum(-1)[kept].mean()
    assert metric.compute().item() == pytest.approx(2 / 3 * form.item() / 0.5 / 0.1, **CLOSE)
    shifted = KLCurvature(likelihood=likelihood, scale=2 / 3)  # type: ignore[arg-type]
    shifted.update(z, z - 1e-6 * tangent, epsilon=1e-6, descent=0.5, lr=0.1, mask=kept)
    # First order in ε, and the change 1e-6 of numbers known to 2⁻⁵³.
    assert shifted.compute().item() == pytest.approx(metric.compute().item(), rel=1e-5)


def test_plain_pytorch_loop() -> None:
    """The loop of docs/plain_pytorch.md, checked against the dense matrices of every step."""
    network, data = mlp(3, 4, 3), _generator(3)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01, weight_decay=0.1)
    curvature, kl = FiniteDifferenceCurvature(), KLCurvature()
    for _ in range(4):
        x, y = torch.randn(9, 3, generator=data).double(), torch.randint(3, (9,), generator=data)
        before = {name: p.detach().clone() for name, p in network.named_parameters()}
        outputs = network(x)
        loss = F.cross_entropy(outputs, y)
        optimizer.zero_grad()
        loss.backward()
        update = ParameterUpdate(optimizer)
        optimizer.step()
        update.complete()
        with torch.no_grad(), update.at(0.01):
            shifted = network(x)
        with torch.no_grad(), update.at(-0.01):
            opposite = F.cross_entropy(network(x), y)
        curvature.update(opposite, loss.detach(), F.cross_entropy(shifted, y), 0.01, update.lr, update.descent)
        kl.update(outputs, shifted, 0.01, update.descent, update.lr)
        after = {name: p.detach().clone() for name, p in network.named_parameters()}
        truth = reference(network, F.cross_entropy, [Part(x, y, torch.get_rng_state(), {})], before, after)
        if truth.descent > 0:
            # Second differences are off by O(ε²), 1e-4 times a constant of order 1; KL by O(ε), 1e-2 times one.
            hessian, gauss_newton = truth.hessian / truth.descent / 0.01, truth.gauss_newton / truth.descent / 0.01
            assert curvature.compute().item() == pytest.approx(hessian, rel=1e-3)
            assert kl.compute().item() == pytest.approx(gauss_newton, rel=2e-2)
        curvature.reset()
        kl.reset()


def test_moves_to_a_device() -> None:
    metric = DirectionalCurvature().to("meta")
    assert {s.device.type for s in (metric.numerator, metric.denominator, metric.weight, metric.lr_sum)} == {"meta"}
    metric.update(torch.ones((), device="meta"), 1.0)  # plain numbers and tensors come along
    assert metric.compute().device.type == "meta"


@pytest.mark.parametrize("kind", METRICS)
def test_half_precision_inputs(kind: str) -> None:
    (u,) = random_updates(kind, 1)
    rounded = {k: v.bfloat16() if isinstance(v, Tensor) else v for k, v in u.items()}
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in rounded.items()}
    # Tensors are worked on in float32: its 2⁻²⁴ times the terms counted in the tests of the likelihoods.
    metric = METRICS[kind]()
    metric.update(**rounded)
    assert metric.compute().item() == pytest.approx(ratio(kind, [wide]), rel=80 * 2.0**-24)
