"""λ_osc: the path's second differences, P and the edge against dense matrices and the formulas of the optimizers."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_curvature import DirectionalCurvatureMonitor
from lightning_curvature.functional import oscillation, oscillation_cosine
from lightning_curvature.optimizers.oscillation import Trail
from tests.helpers.counting import Passes
from tests.helpers.runs import Classifier, MakeOptimizer, Outcome, Step, classification, mlp, rows, run

STEPS = 36
# Both losses of a pair are off by a rounding u of their size, and ε is such that rounding and truncation meet: about
# the root of √6 u L/(ε₁²sᵀHs), with the eigenvalue of the edge: six to seven digits in float64.
PAIR = 1e-5


def scheduled(make: Callable[[Any], torch.optim.Optimizer]) -> MakeOptimizer:
    """Learning rates that change after each step: the edge is that of the step, not of the next."""

    def configured(module: nn.Module) -> Any:
        optimizer = make(module.parameters())
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 + 0.02 * step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    return configured


def adaptive_square(gradients: Sequence[Tensor], beta: float) -> Tensor:
    """The moving average of g², without bias correction."""
    v = torch.zeros_like(gradients[0])
    for g in gradients:
        v = beta * v + (1.0 - beta) * g**2
    return v


def of_adam(gradients: Sequence[Tensor], lr: float) -> tuple[Tensor, float]:
    t = len(gradients)
    return (adaptive_square(gradients, 0.99) / (1.0 - 0.99**t)).sqrt() + 1e-8, 6.0 * (1.0 - 0.5**t) / lr


# Optimizer, and P with the threshold on P^{-1/2}HP^{-1/2} from all gradients up to the step (Cohen et al.).
OPTIMIZERS: dict[str, tuple[Any, Callable[[Sequence[Tensor], float], tuple[Tensor, float]]]] = {
    "gradient descent": (
        lambda p: torch.optim.SGD(p, lr=3.0),
        lambda g, lr: (torch.ones_like(g[0]), 2.0 / lr),
    ),
    "heavy ball": (
        lambda p: torch.optim.SGD(p, lr=1.5, momentum=0.5),
        lambda g, lr: (torch.ones_like(g[0]), 3.0 / lr),
    ),
    "Nesterov": (
        lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.5, nesterov=True),
        lambda g, lr: (torch.ones_like(g[0]), 1.5 / lr),
    ),
    "Adam": (lambda p: torch.optim.Adam(p, lr=0.2, betas=(0.5, 0.99)), of_adam),
    "AdamW": (lambda p: torch.optim.AdamW(p, lr=0.2, betas=(0.5, 0.99), weight_decay=0.0), of_adam),
    "RMSprop": (
        lambda p: torch.optim.RMSprop(p, lr=0.1, alpha=0.9),
        lambda g, lr: (adaptive_square(g, 0.9).sqrt() + 1e-8, 2.0 / lr),
    ),
}


def learner(make: MakeOptimizer, dtype: torch.dtype = torch.float64) -> Classifier:
    return Classifier(mlp(4, 6, 3, dtype=dtype), make)


def flat(values: dict[str, Tensor]) -> Tensor:
    return nn.utils.parameters_to_vector(list(values.values()))


def dense(module: Classifier, step: Step) -> tuple[Tensor, Tensor]:
    """Gradient and Hessian at θ_t."""
    (part,) = step.parts

    def loss(vector: Tensor) -> Tensor:
        pieces = vector.split([p.numel() for p in step.before.values()])
        values = {n: q.reshape(p.shape) for (n, p), q in zip(step.before.items(), pieces, strict=True)}
        return module.loss(torch.func.functional_call(module.network, values, (part.x,)), part.y)

    before = flat(step.before)
    return torch.autograd.functional.jacobian(loss, before), torch.autograd.functional.hessian(loss, before)


def cosine_of(s: Tensor, last: Tensor, p: Tensor) -> float:
    return float((s * p * last).sum() / ((s * p * s).sum() * (last * p * last).sum()).sqrt())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_values_are_those_of_dense_matrices(name: str) -> None:
    make, edge_of = OPTIMIZERS[name]
    module, batch = learner(scheduled(make)), classification(1)[0]
    pair = DirectionalCurvatureMonitor(estimators=("oscillation",), every_n_train_steps=1)
    exact = DirectionalCurvatureMonitor(estimators=("oscillation", "hvp"), every_n_train_steps=1, prefix="exact")
    outcome = run(module, [batch] * STEPS, pair, exact)
    found, products = rows(outcome.capture), rows(outcome.capture, "exact")
    path = [flat(step.before) for step in outcome.steps] + [flat(outcome.steps[-1].after)]
    gradients, flipped = [], 0
    for t, step in enumerate(outcome.steps):
        g, hessian = dense(module, step)
        gradients.append(g)
        if t < 3:
            assert math.isnan(found[t]["oscillation_cosine"])
            continue
        d = [path[k] - path[k + 1] for k in range(t - 3, t + 1)]
        s, last = d[3] - 2.0 * d[2] + d[1], d[2] - 2.0 * d[1] + d[0]
        p, edge = edge_of(gradients, step.lr)
        cosine = cosine_of(s, last, p)
        # s is a difference of numbers up to some hundred times its size, on both sides alike; sums of 45 terms.
        assert found[t]["oscillation_cosine"] == pytest.approx(cosine, abs=1e-11)
        growth = float(((s * p * s).sum() / (last * p * last).sum()).sqrt())
        assert found[t]["oscillation_growth"] == pytest.approx(growth, rel=1e-11)
        assert found[t]["oscillation_edge"] == pytest.approx(edge, rel=1e-12)
        curvature = float(s @ hessian @ s / (s * p * s).sum())
        size = float(torch.linalg.matrix_norm(hessian / p.sqrt() / p.sqrt()[:, None], 2))
        for row, tolerance in ((found[t], PAIR), (products[t], 1e-11)):
            if cosine < -0.9:
                flipped += 1
                assert row["lambda_osc"] == pytest.approx(curvature, rel=0.0, abs=tolerance * size)
                assert row["oscillation_ratio"] == pytest.approx(row["lambda_osc"] / edge, rel=1e-12)
            else:
                assert math.isnan(row["lambda_osc"])
                assert math.isnan(row["oscillation_ratio"])
    assert flipped >= 4


def test_independent_updates_have_two_thirds() -> None:
    """Weights 1, −2, 1 of each update: −4/6."""
    torch.manual_seed(0)
    d = torch.randn(4, 100_000, dtype=torch.float64)
    s, last = oscillation(*d[:3]), oscillation(*d[1:])
    cosine = oscillation_cosine(float(s @ last), float(s @ s), float(last @ last))
    assert cosine == pytest.approx(-2.0 / 3.0, abs=4.0 / math.sqrt(d.shape[1]))  # four deviations


@pytest.mark.parametrize("every", [1, 2, 3, 4, 5, 9])
def test_the_three_steps_before_a_measured_one_are_kept_and_no_others(every: int) -> None:
    trail, weight, copies = Trail(every), torch.zeros(2), []
    for step in range(20):
        weight.add_(step)  # a triangular number
        trail.pass_by(step, lambda: [weight])
        trail.pass_by(step, lambda: [weight])  # as LBFGS comes
        copies.append(len(trail._kept))
        before = trail.before([weight])
        if step % every == 0:
            expected = [float(sum(range(k + 1))) for k in (step - 1, step - 2, step - 3)] if step >= 3 else None
            assert (before and [float(one[0][0]) for one in before]) == expected
    assert max(copies) == 3
    assert copies[-6:] == [min(3, max(0, 3 + step % every - every + 1)) if every > 3 else 3 for step in range(14, 20)]


def test_steps_of_other_optimizers_count() -> None:
    """Of two in turns every second global step is one of the followed optimizer."""
    trail, weight = Trail(6, stride=2), torch.zeros(1)
    for step in range(0, 13, 2):
        trail.pass_by(step, lambda: [weight])
    assert trail.before([weight]) is not None


def flipping(*monitors: Any, module: Classifier | None = None, **trainer: Any) -> Outcome:
    """Gradient descent on one batch beyond the edge."""
    make, _ = OPTIMIZERS["gradient descent"]
    batch = classification(1)[0]
    return run(module or learner(lambda m: make(m.parameters())), [batch] * STEPS, *monitors, **trainer)


@pytest.mark.parametrize(("others", "forwards", "backwards"), [((), 2, 0), (("hvp",), 2, 4), (("kl",), 3, 0)])
def test_passes_are_made_where_the_path_flips_alone(others: tuple[Any, ...], forwards: int, backwards: int) -> None:
    """Two forwards; with "hvp" a forward and two backwards, beside its own; on other steps what the others take."""
    make, _ = OPTIMIZERS["gradient descent"]
    module = learner(lambda m: make(m.parameters()))
    passes = Passes(module.network)
    monitor = DirectionalCurvatureMonitor(estimators=("oscillation", *others), every_n_train_steps=4)
    found = rows(flipping(passes, monitor, module=module).capture)
    own = {(): (0, 0), ("hvp",): (1, 2), ("kl",): (1, 0)}[others]
    flips = [row["oscillation_cosine"] < -0.9 for row in found.values()]
    assert 2 <= sum(flips) < len(flips)
    for index, flipped in enumerate(flips):
        measured = (forwards, backwards) if flipped else own
        # The first measured step is repeated once, which shows whether it can be.
        assert passes.forwards[4 * index] == 1 + measured[0] + (index == 0)
        assert passes.backwards[4 * index] == 1 + measured[1]
        assert passes.forwards[4 * index + 1 : 4 * index + 4] == [1, 1, 1]


class Wavering(Classifier):
    """Dropout, BatchNorm, and from a step on a forward that fails where it is repeated."""

    def __init__(self, fails: bool) -> None:
        torch.manual_seed(0)
        layers = [nn.Linear(4, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Dropout(0.01), nn.Linear(12, 3)]
        super().__init__(nn.Sequential(*layers).double(), lambda m: torch.optim.SGD(m.parameters(), lr=3.0))
        self.fails = fails

    def forward(self, x: Tensor) -> Tensor:
        if self.fails and not torch.is_grad_enabled() and self.global_step > 0:
            raise RuntimeError("no memory")
        return super().forward(x)


@pytest.mark.filterwarnings("ignore::lightning_curvature.CurvatureWarning")
@pytest.mark.parametrize("fails", [False, True])
def test_the_run_is_the_same_without(fails: bool) -> None:
    monitor = DirectionalCurvatureMonitor(estimators=("oscillation",), every_n_train_steps=1)
    plain, watched = flipping(module=Wavering(False)), flipping(monitor, module=Wavering(fails))
    for name, value in plain.module.state_dict().items():
        assert torch.equal(value, watched.module.state_dict()[name]), name
    found = list(rows(watched.capture).values())
    assert any(row["oscillation_cosine"] < -0.9 for row in found)
    assert monitor.result is not None
    assert any(math.isfinite(row["lambda_osc"]) for row in found) != fails


class TwoSteps(Classifier):
    """Two optimizer steps a batch, by hand."""

    def __init__(self) -> None:
        super().__init__(mlp(4, 6, 3), lambda m: OPTIMIZERS["gradient descent"][0](m.parameters()))
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        for _ in range(2):
            optimizer.zero_grad()
            self.manual_backward(self.loss(self(batch[0]), batch[1]))
            optimizer.step()


def test_the_last_of_several_steps_of_a_batch_is_measured() -> None:
    """Measured every tenth step: the one before it belongs to the same batch."""
    monitor = DirectionalCurvatureMonitor(estimators=("oscillation",), every_n_train_steps=10)
    found = rows(run(TwoSteps(), classification(1) * 18, monitor).capture)
    assert len(found) >= 4
    assert [math.isfinite(row["oscillation_cosine"]) for row in found.values()] == [False, *[True] * (len(found) - 1)]
    single = DirectionalCurvatureMonitor(estimators=("oscillation",), every_n_train_steps=1)
    each = list(rows(flipping(single).capture).values())
    for index, row in enumerate(list(found.values())[1:], 1):
        # The same steps one by one: the second of the batch that begins with step 10, 20, 30.
        assert row["oscillation_cosine"] == pytest.approx(each[10 * index + 1]["oscillation_cosine"], abs=1e-9)


def test_windows_of_several_batches_are_one_step() -> None:
    """Two halves of a batch under accumulation make the values of the whole."""
    make, _ = OPTIMIZERS["gradient descent"]
    (x, y), monitors = (
        classification(1)[0],
        [DirectionalCurvatureMonitor(estimators=("oscillation",), every_n_train_steps=4) for _ in range(2)],
    )
    whole = rows(flipping(monitors[0]).capture)
    halves = [(x[:4], y[:4]), (x[4:], y[4:])]
    module = learner(lambda m: make(m.parameters()))
    cut = rows(run(module, halves * STEPS, monitors[1], accumulate_grad_batches=2).capture)
    assert whole.keys() == cut.keys()
    for step, row in whole.items():
        # Gradients in another order, and the path beyond the edge multiplies what differs: 36 steps of at most 2.
        assert cut[step]["oscillation_cosine"] == pytest.approx(row["oscillation_cosine"], abs=1e-6, nan_ok=True)
        assert cut[step]["lambda_osc"] == pytest.approx(row["lambda_osc"], rel=1e-4, nan_ok=True)


class Unknown(torch.optim.SGD):
    """Steps by itself."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda p: Unknown(p, lr=3.0), "optimizer must be one of torch.optim's SGD, .*, got Unknown"),
        (lambda p: torch.optim.SGD(p, lr=1e-4), "the path does not flip at each step: the cosine must be below -0.9"),
    ],
)
def test_it_says_why_there_is_no_value(make: Any, reason: str) -> None:
    monitor = DirectionalCurvatureMonitor(estimators=("oscillation",), every_n_train_steps=1)
    outcome = flipping(monitor, module=learner(lambda m: make(m.parameters())))
    assert monitor.result is not None
    assert re.search(reason, monitor.result.reasons["lambda_osc"])
    assert math.isnan(list(rows(outcome.capture).values())[-1]["lambda_osc"])


def test_first_steps_lack_those_before() -> None:
    monitor = DirectionalCurvatureMonitor(estimators=("oscillation",), every_n_train_steps=1)
    flipping(monitor, max_steps=3)
    assert monitor.result is not None
    assert monitor.result.reasons == {"lambda_osc": "it needs the three steps before the measured one"}


def test_steps_uphill_have_it_too() -> None:
    """Momentum overshoots: there is no λ_dir where gᵀd ≤ 0, and the oscillation does not ask."""
    monitor = DirectionalCurvatureMonitor(estimators=("oscillation", "hvp"), every_n_train_steps=1)
    outcome = flipping(monitor, module=learner(lambda m: torch.optim.SGD(m.parameters(), lr=1.0, momentum=0.9)))
    found = [row for row in rows(outcome.capture).values() if row["oscillation_cosine"] < -0.9]
    uphill = [row for row in found if row["descent"] <= 0.0]
    assert uphill
    assert all(math.isfinite(row["lambda_osc"]) and math.isnan(row["lambda_dir"]) for row in uphill)


def test_float32_values_lie_within_their_error() -> None:
    """Of smooth and of kinked networks, against products in float64 on the path as it was."""
    inside, outside = 0, 0
    for activation in (nn.Tanh, nn.GELU, nn.ReLU):
        torch.manual_seed(3)
        network = nn.Sequential(nn.Linear(4, 24), activation(), nn.Linear(24, 24), activation(), nn.Linear(24, 3))
        module = Classifier(network, lambda m: torch.optim.SGD(m.parameters(), lr=1.5))
        monitor = DirectionalCurvatureMonitor(estimators=("oscillation",), every_n_train_steps=1)
        data = classification(1, 32, dtype=torch.float32)
        outcome = run(module, data * 120, monitor, precision="32-true")
        exact = copy.deepcopy(module).double()
        steps, path = outcome.steps, [flat(step.before).double() for step in outcome.steps]
        for t, row in rows(outcome.capture).items():
            if not math.isfinite(row["lambda_osc"]) or t + 1 == len(path):
                continue
            d = [path[k] - path[k + 1] for k in range(t - 2, t + 1)]
            s = d[2] - 2.0 * d[1] + d[0]
            step = copy.deepcopy(steps[t])
            step.before = {name: value.double() for name, value in step.before.items()}
            step.parts = [type(part)(part.x.double(), part.y, part.rng, part.buffers) for part in step.parts]
            _, hessian = dense(exact, step)
            off = abs(row["lambda_osc"] - float(s @ hessian @ s / (s @ s))) / abs(row["lambda_osc"])
            inside, outside = inside + (off <= row["lambda_osc_error"]), outside + (off > row["lambda_osc_error"])
    assert inside + outside >= 60
    assert inside >= 0.9 * (inside + outside), (inside, outside)
