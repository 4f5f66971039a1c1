"""Regimes and alarms of series whose regime is known: quadratics with their thresholds, written-down spikes."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_curvature.functional import (
    REGIMES,
    adaptive_threshold,
    catapult_alarm,
    edge_ratio,
    momentum_threshold,
    regime,
)
from lightning_curvature.functional.regime_tracker import trend

STEPS = 60
NAN = math.nan


def named(loss: Tensor, **series: Tensor) -> list[str]:
    return [REGIMES[int(i)] for i in regime(loss, **series)]  # type: ignore[arg-type]


def constant(value: float, steps: int = STEPS) -> Tensor:
    return torch.full((steps,), value, dtype=torch.float64)


def series(function: Callable[[Tensor], Tensor], steps: int = STEPS) -> Tensor:
    return function(torch.arange(steps, dtype=torch.float64))


class Run:
    """Steps of a torch optimizer on ½ a (x² + y²/10) + a: losses, and cosine and growth of second differences."""

    def __init__(self, make: Callable[[list[Tensor]], torch.optim.Optimizer], a: float, steps: int = STEPS) -> None:
        x = torch.nn.Parameter(torch.tensor([1.0, 0.3], dtype=torch.float64))
        optimizer, curvatures = make([x]), torch.tensor([a, 0.1 * a], dtype=torch.float64)
        losses, path = [], [x.detach().clone()]
        for _ in range(steps):
            optimizer.zero_grad()
            loss = 0.5 * (curvatures * x * x).sum() + a
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            path.append(x.detach().clone())
        self.loss = torch.tensor(losses, dtype=torch.float64)
        d = torch.stack(path[:-1]) - torch.stack(path[1:])
        s = d[2:] - 2.0 * d[1:-1] + d[:-2]
        before, after = s[:-1], s[1:]
        unknown = constant(NAN, 3)
        self.cosine = torch.cat([unknown, torch.cosine_similarity(after, before, dim=-1, eps=0.0)])
        self.growth = torch.cat([unknown, after.norm(dim=-1) / before.norm(dim=-1)])


LR = 0.1
ROOT = 1e9


def constant_adam(parameters: list[Tensor]) -> torch.optim.Optimizer:
    """Adam late in training, whose second moment stands still: all but 1e-16 of it is kept at each step."""
    optimizer = torch.optim.Adam(parameters, lr=LR, betas=(0.5, 1.0 - 2.0**-53), eps=0.0)
    zero = torch.zeros_like(parameters[0].detach())
    state = {"step": torch.tensor(1e18), "exp_avg": zero.clone(), "exp_avg_sq": zero + ROOT**2}
    optimizer.state[parameters[0]] = state
    return optimizer


OPTIMIZERS = {
    "gradient descent": (lambda p: torch.optim.SGD(p, lr=LR), momentum_threshold(LR)),
    "heavy ball": (lambda p: torch.optim.SGD(p, lr=LR, momentum=0.8), momentum_threshold(LR, 0.8)),
    "Adam": (lambda p: constant_adam(p), ROOT * adaptive_threshold(LR, 0.5)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(("ratio", "expected"), [(0.5, "descent"), (0.98, "edge of stability")])
def test_quadratics_below_their_threshold(name: str, ratio: float, expected: str) -> None:
    make, threshold = OPTIMIZERS[name]
    run = Run(make, ratio * threshold)
    found = named(run.loss, sharpness=constant(ratio * threshold), threshold=constant(threshold))
    # Once the rest of the loss is below a thousandth it is flat; a heavy ball that starts from rest first swings up.
    assert set(found[8:]) <= {expected, "flat", "catapult"}
    assert found[10] == expected
    if run.loss.max() == run.loss[0]:
        assert not catapult_alarm(run.loss, cosine=run.cosine, growth=run.growth).any()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_quadratics_beyond_their_threshold(name: str) -> None:
    make, threshold = OPTIMIZERS[name]
    # Forty steps: Adam's second moment stands still while x is below 1e5, and x grows by less than 1.4 a step.
    run = Run(make, 1.05 * threshold, 40)
    found = named(run.loss, sharpness=constant(1.05 * threshold, 40), threshold=constant(threshold, 40))
    # No sharpness falls: nothing but the edge, the first steps of the rise, and the end; from eight losses on.
    slow = {"catapult"} if name == "gradient descent" else set()
    assert set(found) == {"edge of stability", "diverging"} | slow
    assert set(found[20:]) == {"diverging"}
    alarm = catapult_alarm(run.loss, cosine=run.cosine, growth=run.growth)
    assert alarm[8:].all()


def test_the_alarm_of_a_quadratic_whose_learning_rate_is_raised() -> None:
    """At ratio 0.5 its oscillation is gone; raised to 1.2 it grows by 1.4 a step from a displacement of 1e-6."""
    growth, start = 1.4, 1e-6
    x = torch.cat([constant(start, 30), start * growth ** series(lambda t: t, 60)])
    loss = 1.0 + x**2
    cosine = torch.cat([constant(0.99, 31), constant(-1.0, 59)])
    factor = torch.cat([constant(1.0, 31), constant(growth, 59)])
    alarm = catapult_alarm(loss, cosine=cosine, growth=factor)
    first, doubled = int(alarm.nonzero()[0]), int((loss > 2.0).nonzero()[0])
    # With h = 2 the first step at which x² > 1.4⁻⁴, which is two steps before x² > 1, or three by rounding to steps.
    assert doubled - first in (2, 3)
    assert alarm[first:doubled].all()


def test_the_alarm_needs_oscillation_growth_and_a_loss_that_would_double() -> None:
    loss = torch.cat([constant(1.0, 20), constant(1.5, 3)])
    cosine, growth = constant(-1.0, 23), constant(1.5, 23)
    assert catapult_alarm(loss, cosine=cosine, growth=growth).nonzero().flatten().tolist() == [20, 21, 22]
    assert not catapult_alarm(loss, cosine=constant(-0.89, 23), growth=growth).any()
    assert not catapult_alarm(loss, cosine=cosine, growth=constant(1.0, 23)).any()
    # 0.5 ρ⁴ < 1 for ρ < 2^¼ = 1.189.
    assert not catapult_alarm(loss, cosine=cosine, growth=constant(1.18, 23)).any()
    assert catapult_alarm(loss, cosine=cosine, growth=constant(1.2, 23)).any()
    # Two measured steps in a row, or as many as asked for; steps between them that were not measured do not count.
    late = torch.cat([constant(NAN, 20), torch.tensor([1.5, NAN, 1.5], dtype=torch.float64)])
    assert catapult_alarm(loss, cosine=cosine, growth=late).nonzero().flatten().tolist() == [22]
    assert catapult_alarm(loss, cosine=cosine, growth=late, steps=1).nonzero().flatten().tolist() == [20, 22]
    assert not catapult_alarm(loss, cosine=cosine, growth=late, steps=3).any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite(bad: float) -> None:
    loss = torch.cat([constant(1.0, 20), constant(bad, 2)])
    assert named(loss)[-2:] == ["diverging"] * 2
    assert catapult_alarm(loss).tolist() == [False] * 20 + [True] * 2


def test_regimes_by_loss_and_sharpness() -> None:
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(STEPS, generator=g, dtype=torch.float64)
    still, falling = constant(1.0), series(lambda t: 0.98**t)
    assert named(still)[:8] == ["unknown"] * 7 + ["flat"]
    assert set(named(falling)[7:]) == {"descent"}
    assert set(named(falling, sharpness=series(lambda t: 1.01**t))[4:]) == {"progressive sharpening"}
    # Measured at every fifth step: five values are there at step 20.
    seldom = torch.where(series(lambda t: t) % 5 == 0, series(lambda t: 1.01**t), NAN)
    names = named(falling, sharpness=seldom)
    assert (names[19], set(names[20:])) == ("descent", {"progressive sharpening"})
    # White noise of 5 %, whose windows of 20 have no trend by three standard errors.
    names = named(1.0 + 0.05 * noise, edge_ratio=constant(0.6))
    assert names[7:].count("noise-driven oscillation") >= 0.95 * (STEPS - 7)
    assert set(named(1.0 + 0.05 * noise)) == {"unknown"} | ({"descent"} & set(names))
    assert "noise-driven oscillation" in named(1.0 + 0.05 * noise, cosine=constant(-0.67))
    assert set(named(still, edge_ratio=constant(1.02))) == {"edge of stability"}


def test_the_edge_is_entered_and_left_at_two_ratios() -> None:
    ratio = torch.tensor([0.94, 0.95, 0.92, NAN, 0.9, 0.89, 0.94], dtype=torch.float64)
    at = [name == "edge of stability" for name in named(constant(1.0, 7), edge_ratio=ratio)]
    assert at == [False, True, True, True, True, False, False]


def test_a_spike_is_a_catapult_where_the_sharpness_falls_and_a_divergence_elsewhere() -> None:
    loss = torch.cat([constant(1.0, 20), torch.tensor([1.9, 4.0, 12.0, 30.0, 16.0, 3.0, 1.4, 1.2]).double()])
    fallen = torch.cat([constant(5.0, 21), constant(4.0, 7)])
    assert named(loss, sharpness=fallen)[20:] == ["unknown", *["catapult"] * 5, "unknown", "unknown"]
    same = named(loss, sharpness=constant(5.0, 28))[20:]
    # At 12 and 30 it rises beyond ten times; three steps from the last rise it is over.
    assert same == ["unknown", "catapult", *["diverging"] * 4, "unknown", "unknown"]
    # From 10⁴ on no fall of the sharpness counts.
    assert named(torch.where(loss == 30.0, 1.1e4, loss), sharpness=fallen)[23] == "diverging"


def test_scatter_of_mini_batches_is_no_spike() -> None:
    g = torch.Generator().manual_seed(1)
    loss = torch.exp(0.5 * torch.randn(2000, generator=g, dtype=torch.float64))
    names = named(loss, edge_ratio=constant(0.5, 2000))
    # Of a factor of e^{0.5} up or down, a doubled least loss is nothing unusual; 6 standard deviations are.
    assert (loss[20:] > 2.0 * loss.unfold(0, 20, 1)[:-1].min(1).values).double().mean() > 0.5
    assert names.count("catapult") < 0.02 * 2000


def test_causal() -> None:
    """The regime of a prefix is the prefix of the regime, at every length."""
    g = torch.Generator().manual_seed(2)
    jumps = torch.randn(300, generator=g, dtype=torch.float64)
    loss = torch.exp(0.05 * jumps.cumsum(0))
    loss[::50] *= 20.0
    values = {
        "edge_ratio": 0.9 + 0.02 * jumps.cumsum(0),
        "sharpness": (0.05 * jumps).cumsum(0).exp(),
        "cosine": jumps.cos(),
    }
    whole = regime(loss, **values)
    alarm = catapult_alarm(loss, cosine=-values["cosine"].abs(), growth=1.0 + jumps.abs())
    assert len(set(whole.tolist())) >= 5
    assert alarm.any()
    for length in range(1, 300, 7):
        cut = {name: one[:length] for name, one in values.items()}
        assert torch.equal(regime(loss[:length], **cut), whole[:length])
        found = catapult_alarm(loss[:length], cosine=-cut["cosine"].abs(), growth=1.0 + jumps[:length].abs())
        assert torch.equal(found, alarm[:length])


def test_a_loss_in_other_units_has_the_same_regimes() -> None:
    loss = series(lambda t: 1.0 + torch.sin(t / 3.0) * 0.9, 200)
    # A power of two: not a bit of rounding differs.
    assert torch.equal(regime(loss), regime(loss * 1024.0))


def test_trend_of_noise_has_its_standard_error() -> None:
    g = torch.Generator().manual_seed(3)
    rows = torch.randn(4000, 20, generator=g, dtype=torch.float64).tolist()
    found = [trend(row) for row in rows]
    changes = torch.tensor([change for change, _, _ in found])
    # Exactly: 19 / √(Σ(i − 9.5)²) = 19 / √665 = 0.737; √(12/20) = 0.775 is 5 % above it. 4000 rows tell it to 1.1 %.
    assert changes.std().item() == pytest.approx(19.0 / math.sqrt(665.0), rel=0.04)
    assert sorted(scatter for _, scatter, _ in found)[2000] == pytest.approx(1.0, rel=0.1)  # median of a skewed one
    line = [3.0 - 0.25 * i for i in range(9)]
    assert trend(line) == pytest.approx((-2.0, 0.0, 2.0), abs=1e-15)


TRUTH = [
    ({"full_batch": True, "lambda_max": 18.0, "threshold": 20.0}, 0.9, "lambda_max"),
    ({"full_batch": True, "lambda_osc": 19.0, "cosine": -0.95, "threshold": 20.0}, 0.95, "lambda_osc"),
    (
        {"full_batch": True, "lambda_osc": 19.0, "cosine": -0.95, "lambda_max": 18.0, "threshold": 20.0},
        0.95,
        "lambda_osc",
    ),
    (
        {"full_batch": True, "lambda_osc": 17.0, "cosine": -0.95, "lambda_max": 18.0, "threshold": 20.0},
        0.9,
        "lambda_max",
    ),
    (
        {"full_batch": True, "lambda_osc": 19.0, "cosine": -0.85, "lambda_max": 18.0, "threshold": 20.0},
        0.9,
        "lambda_max",
    ),
    ({"full_batch": True, "lambda_max": 18.0, "threshold": 20.0, "stability_index": 0.3}, 0.9, "lambda_max"),
    ({"full_batch": True, "lambda_max": 18.0, "threshold": math.inf}, 0.0, "lambda_max"),
    ({"full_batch": False, "lambda_max": 18.0, "threshold": 20.0, "stability_index": 0.3}, 0.3, "stability_index"),
    ({"full_batch": False, "lambda_osc": 19.0, "cosine": -0.95, "threshold": 20.0}, 0.95, "lambda_osc"),
    (
        {"full_batch": False, "lambda_osc": 19.0, "cosine": -0.67, "lambda_max": 18.0, "threshold": 20.0},
        NAN,
        "mini-batches leave",
    ),
    ({"full_batch": True, "lambda_max": 18.0}, NAN, "the optimizer has no threshold"),
    ({"full_batch": True, "lambda_max": 18.0, "threshold": -2.0}, NAN, "the optimizer has no threshold"),
    ({"full_batch": True, "lambda_osc": 19.0, "threshold": 20.0}, NAN, "neither λ_max nor"),
]


@pytest.mark.parametrize(("known", "value", "told"), TRUTH)
def test_edge_ratio(known: dict[str, float], value: float, told: str) -> None:
    found = edge_ratio(**known)  # type: ignore[arg-type]
    assert found.value == pytest.approx(value, rel=1e-15, nan_ok=True)
    assert (found.source == told and not found.reason) or (found.source is None and found.reason.startswith(told))


def test_bad_arguments() -> None:
    loss = constant(1.0)
    with pytest.raises(
        ValueError, match=r"^threshold must come with sharpness, got it alone: give both, or edge_ratio"
    ):
        regime(loss, threshold=loss)
    with pytest.raises(
        ValueError, match=r"^edge_ratio must be \(steps,\) with steps ≥ 1, steps = 60 of loss, got \(59,\)"
    ):
        regime(loss, edge_ratio=loss[1:])
    with pytest.raises(ValueError, match=r"^window must be a whole number of at least 8, got 7: 20 losses tell"):
        regime(loss, window=7)
    with pytest.raises(ValueError, match=r"^steps must be a whole number of at least 1, got 0: 2 measured steps"):
        catapult_alarm(loss, steps=0)
