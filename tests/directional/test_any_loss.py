"""λ_KL and λ_GN of losses that are no likelihood the batch could tell: their own Gauss–Newton matrix, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_curvature import DirectionalCurvatureMonitor
from tests.helpers.counting import out_of_reach
from tests.helpers.once import OnceSum
from tests.helpers.runs import Batch, Capture, Classifier, classification, loader, make_trainer, mlp, run, warned
from tests.oracles.along_step import ALL, DIFFERENCE, EXACT

CLASSES, SIZE = 4, 8
TARGET = torch.randn(SIZE, CLASSES, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
WEIGHT = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)


def one_hot(y: Tensor) -> Tensor:
    return F.one_hot(y, CLASSES).double()


def focal(z: Tensor, y: Tensor) -> Tensor:
    log_p = z.log_softmax(-1).gather(1, y[:, None])
    return (-((1.0 - log_p.exp()) ** 2) * log_p).mean()


def contrastive(z: Tensor, y: Tensor) -> Tensor:
    first, second = F.normalize(z).chunk(2)
    return F.cross_entropy(first @ second.T / 0.5, torch.arange(len(first)))


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": F.cross_entropy,
    "sum": lambda z, y: F.cross_entropy(z, y, reduction="sum"),
    "class weights": lambda z, y: F.cross_entropy(z, y, weight=WEIGHT),
    "label smoothing": lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1),
    "ignored class": lambda z, y: F.cross_entropy(z, torch.where(y == 0, -7, y), ignore_index=-7),
    "one-hot, mean": lambda z, y: F.mse_loss(z, one_hot(y)),
    "one-hot, sum": lambda z, y: F.mse_loss(z, one_hot(y), reduction="sum") / 8.0,
    "one-hot, half": lambda z, y: 0.5 * (z - one_hot(y)).square().sum(-1).mean(),
    "softmax squared": lambda z, y: F.mse_loss(z.softmax(-1), one_hot(y)),
    "Brier": lambda z, y: (z.softmax(-1) - one_hot(y)).square().sum(-1).mean(),
    "focal": focal,
    "Huber": lambda z, y: F.huber_loss(z, TARGET),
    "Poisson": lambda z, y: F.poisson_nll_loss(z, y[:, None].expand(-1, CLASSES).double()),
    "squared hinge": lambda z, y: (1.0 - z * (2.0 * one_hot(y) - 1.0)).clamp_min(0.0).square().mean(),
    "contrastive": contrastive,
}


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.05)


def monitor(*estimators: str, **options: Any) -> DirectionalCurvatureMonitor:
    options = {"every_n_train_steps": 1, "on_error": "raise"} | options
    return DirectionalCurvatureMonitor(estimators=estimators or ALL, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("pair", [ALL, ("kl", "finite_difference")], ids=["all", "pair"])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.thinned(4)
def test_losses(name: str, pair: tuple[str, ...]) -> None:
    module = Classifier(mlp(4, 6, CLASSES), sgd, loss=LOSSES[name])
    found: list[Any] = []
    batches = classification(3, SIZE, classes=CLASSES)
    assert warned(lambda: found.append(run(module, batches, monitor(*pair)))) == []
    (outcome,) = found
    for index in range(3):
        truth, step, row = outcome.reference(index), outcome.steps[index], outcome.capture.rows[index]
        forms = {"lambda_gn": (truth.gauss_newton, EXACT), "lambda_kl": (truth.gauss_newton, DIFFERENCE)}
        forms |= {"lambda_dir": (truth.hessian, EXACT), "lambda_fd": (truth.hessian, DIFFERENCE)}
        for key, (quadratic, tolerance) in forms.items():
            if f"curvature/{key}" in row:
                value = quadratic / truth.descent / step.lr
                assert row[f"curvature/{key}"] == pytest.approx(value, rel=tolerance), key
                assert row[f"curvature_diagnostics/{key}_error"] < DIFFERENCE


def test_a_loss_that_is_linear_in_the_outputs_has_none() -> None:
    """A quantile loss: its Gauss–Newton matrix is zero, which is not a value that rounding hides."""

    def quantile(z: Tensor, y: Tensor) -> Tensor:
        return torch.maximum(0.9 * (TARGET - z), -0.1 * (TARGET - z)).mean()

    outcome = run(Classifier(mlp(4, 6, CLASSES), sgd, quantile), classification(2, SIZE, classes=CLASSES), monitor())
    for row in outcome.capture.rows.values():
        assert row["curvature/lambda_kl"] == row["curvature/lambda_gn"] == 0.0


class Module(pl.LightningModule):
    """Of a body and a head; a kind says what its step makes of them."""

    def __init__(self, step: Callable[[Any, Batch], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        body = [nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.2), nn.BatchNorm1d(6)]
        self.body, self.head, self.other = nn.Sequential(*body), nn.Linear(6, CLASSES), nn.Linear(6, 1)
        self.behind = nn.Sequential(nn.Linear(CLASSES, 5), nn.Tanh()).requires_grad_(False)
        self.temperature = nn.Parameter(torch.tensor(1.3))
        self.step = step
        self.double()

    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(x))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.step(self, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return sgd(self)


def two_heads(m: Any, batch: Batch) -> Tensor:
    x, y = batch
    features = m.body(x)
    return focal(m.head(features), y) + F.huber_loss(m.other(features)[:, 0], x[:, 0])


def in_place(m: Any, batch: Batch) -> Tensor:
    return focal(m(batch[0]).mul_(2.0), batch[1])


def penalized(m: Any, batch: Batch) -> Tensor:
    return focal(m(batch[0]), batch[1]) + 0.01 * sum(p.square().sum() for p in m.head.parameters())


def tempered(m: Any, batch: Batch) -> Tensor:
    return focal(m(batch[0]) * m.temperature, batch[1])


def views(m: Any, batch: Batch) -> Tensor:
    """Two calls, the second on noise that the step draws."""
    first, second = m(batch[0]), m(batch[0] + 0.1 * torch.randn_like(batch[0]))
    return F.cross_entropy(F.normalize(first) @ F.normalize(second).T / 0.3, torch.arange(len(first)))


def distilled(m: Any, batch: Batch) -> Tensor:
    teacher = m.behind[0](torch.ones(len(batch[0]), CLASSES, dtype=torch.float64))
    return F.kl_div(m(batch[0]).log_softmax(-1), teacher[:, :CLASSES].softmax(-1), reduction="batchmean")


def behind(m: Any, batch: Batch) -> Tensor:
    """A frozen network of the outputs belongs to the loss, and runs with it."""
    return (m.behind(m(batch[0])) - 0.1).square().mean()


def auto_encoded(m: Any, batch: Batch) -> Tensor:
    """The evidence lower bound: three modules make what the loss is a function of, one of them at random."""
    hidden = m.body(batch[0])
    mean, spread = m.head(hidden), m.other(hidden)
    z = mean + torch.randn_like(mean) * (0.5 * spread).exp()
    return (z - batch[0]).square().sum(-1).mean() - 0.5 * (1.0 + spread - mean.square() - spread.exp()).sum(-1).mean()


KINDS: dict[str, tuple[Callable[[Any, Batch], Tensor], set[str], int]] = {
    "two heads": (two_heads, {"head", "other"}, 0),
    "in place": (in_place, {""}, 0),
    "penalty": (penalized, {""}, 2),
    "temperature": (tempered, {""}, 1),
    "two views": (views, {""}, 0),
    "distillation": (distilled, {""}, 0),
    "a frozen network behind": (behind, {""}, 0),
    "evidence lower bound": (auto_encoded, {"head", "other"}, 0),
}


def gauss_newton(module: Module, batch: Batch, before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    """dᵀGd / gᵀd of a step by hand: modules whose calls are listed return z + t·u, and beside them θ + t·d."""
    made = {"head": [], "other": []}  # type: ignore[var-annotated]
    direction = {name: before[name] - after[name] for name in before}
    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    state = torch.get_rng_state()

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        torch.set_rng_state(state)
        return torch.func.functional_call(Step(module), {f"m.{k}": v for k, v in parameters.items()}, (batch,))

    hooks = [
        getattr(module, name).register_forward_hook(lambda m, i, o, n=name: made[n].append(o.clone())) for name in made
    ]
    with torch.autograd.forward_ad.dual_level():
        loss({k: torch.autograd.forward_ad.make_dual(v, direction[k]) for k, v in before.items()})
        pairs = {n: [torch.autograd.forward_ad.unpack_dual(o) for o in calls] for n, calls in made.items()}
    for hook in hooks:
        hook.remove()
    waiting = {n: iter([(z.detach(), u) for z, u in calls]) for n, calls in pairs.items()}

    def moved(m: nn.Module, inputs: Any, output: Tensor, name: str = "") -> Tensor:
        z, u = next(waiting[name])
        return z if u is None else z + t * u

    hooks = [getattr(module, name).register_forward_hook(lambda m, i, o, n=name: moved(m, i, o, n)) for name in waiting]
    value = loss({k: v.detach() + t * direction[k] for k, v in before.items()})
    for hook in hooks:
        hook.remove()
    (slope,) = torch.autograd.grad(value, t, create_graph=True)
    (second,) = torch.autograd.grad(slope, t)
    return float(second / slope)


class Step(nn.Module):
    """A training step as a module, of which parameters can be substituted."""

    def __init__(self, module: Module) -> None:
        super().__init__()
        self.m = module

    def forward(self, batch: Batch) -> Tensor:
        return self.m.step(self.m, batch)


class States(pl.Callback):
    """Parameters and random state at the start of each step."""

    def __init__(self) -> None:
        self.parameters: list[dict[str, Tensor]] = []
        self.random: list[Tensor] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.parameters.append({n: p.detach().clone() for n, p in pl_module.named_parameters() if p.requires_grad})
        self.random.append(torch.get_rng_state())

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.on_train_batch_start(trainer, pl_module)


def fit(module: pl.LightningModule, *callbacks: pl.Callback) -> dict[int, dict[str, float]]:
    """Fit on three batches and return the rows."""
    capture = Capture()
    make_trainer(*callbacks, logger=capture).fit(module, loader(classification(3, SIZE, classes=CLASSES)))
    return capture.rows


@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_steps(name: str) -> None:
    step, made, beside = KINDS[name]
    module, states, batches = Module(step), States(), classification(3, SIZE, classes=CLASSES)
    follow = monitor()
    cuts: list[Any] = []
    original = follow.measure

    def noted(trainer: Any, window: Any, failure: Any) -> None:
        original(trainer, window, failure)
        cuts.append(window.objective.cut)

    follow.measure = noted  # type: ignore[method-assign]
    rows = fit(module, states, follow)
    assert [(set(cut.made), len(cut.parameters)) for cut in cuts] == [(made, beside)] * 3
    module.train()
    for index in range(3):
        torch.set_rng_state(states.random[index])
        before, after = states.parameters[index : index + 2]
        value = gauss_newton(module, batches[index], before, after) / 0.05
        row = rows[index]
        assert row["curvature/lambda_gn"] == pytest.approx(value, rel=EXACT)
        assert row["curvature/lambda_kl"] == pytest.approx(value, rel=DIFFERENCE)
        assert row["curvature/lambda_fd"] == pytest.approx(row["curvature/lambda_dir"], rel=DIFFERENCE)


class Forwards(pl.Callback):
    """Counts the forwards of a body in each batch, those of the step included."""

    def __init__(self) -> None:
        self.calls, self.counts = out_of_reach([]), list[int]()

    def on_train_batch_start(self, *args: Any) -> None:
        self.calls().clear()

    def on_train_batch_end(self, *args: Any) -> None:
        self.counts.append(len(self.calls()))


@pytest.mark.parametrize(("estimators", "extra"), [(("kl", "finite_difference"), 2), (("gauss_newton",), 1)])
def test_forwards(estimators: tuple[str, ...], extra: int) -> None:
    """Once a fit one forward more finds the outputs, and one gives them; then there are as many as for a likelihood."""
    module, counter = Module(lambda m, batch: focal(m(batch[0]), batch[1])), Forwards()
    module.body.register_forward_hook(lambda *args: counter.calls().append(None))
    fit(module, monitor(*estimators), counter)
    # The step, the check of the first measurement, and what is counted here.
    assert counter.counts == [1 + 1 + 2 + extra, 1 + extra, 1 + extra]


def test_a_target_without_gradient_is_another_function_elsewhere() -> None:
    def step(m: Any, batch: Batch) -> Tensor:
        return (m(batch[0]) - m(0.9 * batch[0]).detach()).square().mean()

    follow = monitor("kl", "finite_difference", "hvp", "gauss_newton")
    row = fit(Module(step), follow)[1]
    assert math.isnan(row["curvature/lambda_fd"])
    assert "another function" in follow.result.reasons["lambda_fd"]  # type: ignore[union-attr]
    assert row["curvature/lambda_kl"] == pytest.approx(row["curvature/lambda_gn"], rel=DIFFERENCE)


def test_one_that_fails_takes_no_other_along() -> None:
    """No second derivative by the outputs, and none in forward mode."""

    def step(m: Any, batch: Batch) -> Tensor:
        return F.multi_margin_loss(m(batch[0]), batch[1], p=2)

    follow = monitor(*ALL, on_error="warn")
    messages = warned(lambda: fit(Module(step), follow))
    reasons = follow.result.reasons  # type: ignore[union-attr]
    assert set(reasons) == {"lambda_kl", "lambda_gn", "lambda_dir"}
    assert math.isfinite(follow.result.values()["lambda_fd"])  # type: ignore[union-attr]
    assert "take 'finite_difference' for 'hvp'" in reasons["lambda_dir"]
    assert not any("file an issue" in sentence for sentence in [*messages, *reasons.values()])


def test_a_loss_that_is_differentiable_once() -> None:
    """Its second derivatives are no zeros: the difference of the loss itself is all that there is."""

    def step(m: Any, batch: Batch) -> Tensor:
        return OnceSum.apply(m(batch[0]) - 0.3)

    follow = monitor(*ALL, on_error="warn")
    messages = warned(lambda: fit(Module(step), follow))
    reasons = follow.result.reasons  # type: ignore[union-attr]
    assert set(reasons) == {"lambda_kl", "lambda_gn", "lambda_dir"}
    assert math.isfinite(follow.result.values()["lambda_fd"])  # type: ignore[union-attr]
    assert any("once_differentiable" in sentence for sentence in messages)
