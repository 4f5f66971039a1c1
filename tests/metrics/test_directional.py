"""The metrics against their definitions, in a plain PyTorch loop, and as torchmetrics treats them."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import matplotlib
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

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

matplotlib.use("Agg")

U64 = 2.0**-53
Update = dict[str, Any]


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _updates(kind: str, count: int, seed: int = 0) -> list[Update]:
    """Random arguments of ``count`` updates, float64."""
    g = _generator(seed)
    found = []
    for _ in range(count):
        a, b, c, lr, weight = (torch.rand(5, generator=g).double() + 0.5).tolist()
        z, change = (torch.randn(7, 4, generator=g).double() for _ in range(2))
        shared = {"lr": lr, "weight": weight}
        found.append(
            {
                "plain": {"quadratic": a - 1.0, "descent": b, **shared},
                "difference": {"loss_plus": 1 + a + b, "loss": 1.0, "loss_minus": 1.1 - b, "epsilon": c, **shared},
                "kl": {"outputs": z, "shifted_outputs": z + change, "epsilon": c, "descent": b, **shared},
                "gauss_newton": {"outputs": z, "tangent": change, "descent": b, **shared},
                "critical": {"critical_factor": a, **shared},
            }[kind]
        )
    return found


def _forms(kind: str, u: Update) -> tuple[float, float]:
    """dᵀHd and gᵀd of one update by the textbook formula."""
    if kind == "plain":
        return u["quadratic"], u["descent"]
    if kind == "difference":
        plus, base, minus, epsilon = u["loss_plus"], u["loss"], u["loss_minus"], u["epsilon"]
        return (plus - 2 * base + minus) / epsilon**2, (plus - minus) / (2 * epsilon)
    if kind == "critical":
        return 2 * u["lr"] ** 2, u["critical_factor"] * u["lr"] ** 2
    log_p = u["outputs"].log_softmax(-1)
    p = log_p.exp()
    if kind == "kl":
        divergence = (p * (log_p - u["shifted_outputs"].log_softmax(-1))).sum(-1).mean()
        return 2 * float(divergence) / u["epsilon"] ** 2, u["descent"]
    form = (p * u["tangent"] ** 2).sum(-1) - (p * u["tangent"]).sum(-1) ** 2
    return float(form.mean()), u["descent"]


METRICS: dict[str, Callable[[], DirectionalCurvature]] = {
    "plain": DirectionalCurvature,
    "difference": FiniteDifferenceCurvature,
    "kl": KLCurvature,
    "gauss_newton": GaussNewtonCurvature,
    "critical": CriticalSharpness,
}
every_metric = pytest.mark.parametrize("kind", METRICS)


def _ratio(kind: str, updates: list[Update]) -> float:
    """Σ w dᵀHd/η² over Σ w gᵀd/η."""
    numerator = denominator = 0.0
    for u in updates:
        quadratic, descent = _forms(kind, u)
        numerator += u["weight"] * quadratic / u["lr"] ** 2
        denominator += u["weight"] * descent / u["lr"]
    return numerator / denominator


def _fed(kind: str, updates: list[Update]) -> DirectionalCurvature:
    metric = METRICS[kind]()
    for u in updates:
        metric.update(**u)
    return metric


# Every value here is a ratio of sums of a few terms of one size; the textbook KL and second difference lose ten units.
CLOSE = {"rel": 100 * U64}


@every_metric
@pytest.mark.parametrize("count", [1, 5])
def test_value_is_the_ratio_of_weighted_sums(kind: str, count: int) -> None:
    updates = _updates(kind, count)
    assert _fed(kind, updates).compute().item() == pytest.approx(_ratio(kind, updates), **CLOSE)


@every_metric
def test_merged_metrics_equal_one_over_the_union(kind: str) -> None:
    updates = _updates(kind, 5)
    here, there = _fed(kind, updates[:2]), _fed(kind, updates[2:])
    truth = _ratio(kind, updates)
    merged = copy.deepcopy(here)
    merged.merge_state(there)
    assert merged.compute().item() == pytest.approx(truth, **CLOSE)

    # The same through the synchronization that torchmetrics does between processes, with two stand-ins for them.
    def gather(state: Tensor, group: Any = None) -> list[Tensor]:
        name = next(n for n in here._defaults if getattr(here, n) is state)
        return [state, getattr(there, name)]

    here.dist_sync_fn, here.distributed_available_fn = gather, lambda: True
    assert here.compute().item() == pytest.approx(truth, **CLOSE)
    here.distributed_available_fn, here._computed = lambda: False, None  # each keeps its own sums
    assert here.compute().item() == pytest.approx(_ratio(kind, updates[:2]), **CLOSE)
    # A mean of the two ratios would not do.
    halves = 0.5 * (_ratio(kind, updates[:2]) + _ratio(kind, updates[2:]))
    assert abs(halves / truth - 1.0) > 1e-4


@every_metric
def test_forward_gives_the_value_of_its_own_step_and_keeps_the_sums(kind: str) -> None:
    updates = _updates(kind, 3)
    metric = METRICS[kind]()
    for u in updates:
        assert metric(**u).item() == pytest.approx(_ratio(kind, [u]), **CLOSE)
    assert metric.compute().item() == pytest.approx(_ratio(kind, updates), **CLOSE)
    metric.reset()
    metric.update(**updates[1])
    assert metric.compute().item() == pytest.approx(_ratio(kind, updates[1:2]), **CLOSE)


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
    """The loop that README shows, checked against the dense matrices of every step."""
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


@every_metric
def test_copies_carry_the_sums(kind: str) -> None:
    updates = _updates(kind, 4)
    metric, truth = _fed(kind, updates[:2]), _ratio(kind, updates)
    saved = METRICS[kind]()
    metric.persistent(True)
    saved.persistent(True)
    saved.load_state_dict(metric.state_dict())
    saved._update_count = metric._update_count  # torchmetrics warns otherwise that nothing was seen
    for twin in (metric.clone(), pickle.loads(pickle.dumps(metric)), copy.deepcopy(metric), saved):
        for u in updates[2:]:
            twin.update(**u)
        assert twin.compute().item() == pytest.approx(truth, **CLOSE)
    assert metric.compute().item() == pytest.approx(_ratio(kind, updates[:2]), **CLOSE)


@pytest.mark.parametrize("change", ["half", "double", "float", "bfloat16"])
def test_the_sums_stay_in_float64_when_a_module_changes_its_type(change: str) -> None:
    holder = nn.Module()
    holder.metric = DirectionalCurvature()
    getattr(holder, change)()
    for _ in range(3):
        holder.metric.update(quadratic=1.0 + 2.0**-40, descent=1.0)
    assert holder.metric.compute().dtype == torch.float64
    assert holder.metric.compute().item() == 1.0 + 2.0**-40


def test_moves_to_a_device() -> None:
    metric = DirectionalCurvature().to("meta")
    assert {s.device.type for s in (metric.numerator, metric.denominator, metric.weight, metric.lr_sum)} == {"meta"}
    metric.update(torch.ones((), device="meta"), 1.0)  # plain numbers and tensors come along
    assert metric.compute().device.type == "meta"


@every_metric
def test_half_precision_inputs(kind: str) -> None:
    (u,) = _updates(kind, 1)
    rounded = {k: v.bfloat16() if isinstance(v, Tensor) else v for k, v in u.items()}
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in rounded.items()}
    # Tensors are worked on in float32: its 2⁻²⁴ times the terms counted in the tests of the likelihoods.
    assert _fed(kind, [rounded]).compute().item() == pytest.approx(_ratio(kind, [wide]), rel=80 * 2.0**-24)


def test_plot_draws_the_values() -> None:
    metric = DirectionalCurvature()
    metric.update(quadratic=-1.0, descent=1.0)
    figure, axes = metric.plot()
    assert isinstance(figure, matplotlib.figure.Figure)
    low, high = axes.get_ylim()
    assert low < -1.0 < high  # negative curvature is in the picture
    _, axes = metric.plot([torch.tensor(v) for v in (1.0, 3.0, 2.0)])
    assert [float(y) for y in axes.lines[0].get_ydata()] == [1.0, 3.0, 2.0]
    matplotlib.pyplot.close("all")


def test_bad_arguments_are_explained() -> None:
    with pytest.raises(ValueError, match=r"likelihood must be one of .* got 'poisson': name the one that is trained"):
        KLCurvature(likelihood="poisson")  # type: ignore[arg-type]
    z = torch.zeros(1, 2)
    with pytest.raises(ValueError, match=r"epsilon must be positive, got -1.0: 1.0 is the length of"):
        KLCurvature().update(z, z, epsilon=-1.0, descent=1.0)
    with pytest.raises(ValueError, match=r"epsilon must be positive, got 0: 1.0 is the length of"):
        FiniteDifferenceCurvature().update(1.0, 1.0, 1.0, epsilon=0)
