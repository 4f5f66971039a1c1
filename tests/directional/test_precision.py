"""Float32 and bf16 against float64 along whole runs on real digits, ε found by the monitor itself."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_curvature import DirectionalCurvatureMonitor
from tests.helpers.digits import Attending, convolving, digits
from tests.helpers.directional import SINGLE
from tests.helpers.runs import Classifier, MakeOptimizer, mlp, run
from tests.oracles.along_line import classification_reference

KEYS = {"hvp": "lambda_dir", "gauss_newton": "lambda_gn", "kl": "lambda_kl", "finite_difference": "lambda_fd"}
BF16 = ("gauss_newton", "kl", "finite_difference")
EVERY = 20


@dataclass(frozen=True)
class Setting:
    """An optimizer and the batches it sees; ``batch_size`` None is the full batch."""

    make: MakeOptimizer
    batch_size: int | None
    steps: int


SETTINGS = {
    "descent": Setting(lambda m: torch.optim.SGD(m.parameters(), lr=0.3), None, 180),
    "adamw": Setting(lambda m: torch.optim.AdamW(m.parameters(), lr=6e-3), None, 280),
    "momentum": Setting(lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9), 64, 300),
    "adam": Setting(lambda m: torch.optim.Adam(m.parameters(), lr=2e-3), 64, 400),
}


@dataclass(frozen=True)
class Row:
    """One estimate: relative distance from the float64 value, reported error, training loss."""

    distance: float
    reported: float
    loss: float


@cache
def run_of(name: str, precision: str) -> dict[tuple[str, ...], dict[str, list[Row]]]:
    """Rows of each monitor of a precision, all of which watch one run: by their estimators, then by estimator."""
    setting = SETTINGS[name]
    network: nn.Module = mlp(64, 48, 48, 48, 10, dtype=torch.float32)
    module = Classifier(network, setting.make)
    watching = [tuple(SINGLE), ("kl",)] if precision == "32-true" else [BF16]
    monitors = [
        DirectionalCurvatureMonitor(estimators=estimators, every_n_train_steps=EVERY, prefix=f"c{number}")  # type: ignore[arg-type]
        for number, estimators in enumerate(watching)
    ]
    outcome = run(module, digits(setting.batch_size, setting.steps), *monitors, precision=precision)
    found: dict[tuple[str, ...], dict[str, list[Row]]] = {es: {e: [] for e in es} for es in watching}
    for index in range(0, setting.steps, EVERY):
        step, logged = outcome.steps[index], outcome.capture.rows[index]
        truth = classification_reference(network, step.parts, step.before, step.after)
        if truth.descent <= 0.0:
            continue
        for number, estimators in enumerate(watching):
            for estimator in estimators:
                quadratic = truth.gauss_newton if estimator in ("kl", "gauss_newton") else truth.hessian
                key = KEYS[estimator]
                distance = logged[f"c{number}/{key}"] / (quadratic / truth.descent / step.lr) - 1.0
                error = logged[f"c{number}_diagnostics/{key}_error"]
                found[estimators][estimator].append(Row(distance, error, logged["train_loss"]))
    return found


def rows(name: str, precision: str, estimators: tuple[str, ...]) -> dict[str, list[Row]]:
    """Rows of one monitor by estimator."""
    return run_of(name, precision)[estimators]


@pytest.mark.parametrize("estimator", SINGLE)
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.thinned(7)
def test_float32_from_the_first_steps_to_a_small_loss(name: str, estimator: str) -> None:
    found = rows(name, "32-true", tuple(SINGLE))[estimator]
    assert len(found) > 8
    if name == "adamw":
        assert found[-1].loss < 1e-3
    worst = max(found, key=lambda row: abs(row.distance))
    assert all(abs(row.distance) <= SINGLE[estimator] for row in found), worst


def test_float32_kl_by_itself() -> None:
    """One forward, one-sided: O(ε) where the pair has O(ε²), so a smaller ε; no loss enters, so little rounding."""
    for name in SETTINGS:
        found = rows(name, "32-true", ("kl",))["kl"]
        assert all(abs(row.distance) <= 0.01 for row in found), max(found, key=lambda row: abs(row.distance))


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.thinned(4)
def test_bf16_gauss_newton(name: str) -> None:
    """Eight bits: 2^-9 a rounding, averaged over samples; NaN where gᵀd is lost, which is a matter of the gradient."""
    found = rows(name, "bf16-mixed", BF16)["gauss_newton"]
    values = [row for row in found if math.isfinite(row.distance)]
    assert len(values) >= len(found) / 2
    assert all(abs(row.distance) <= 0.05 for row in values), max(values, key=lambda row: abs(row.distance))


@pytest.mark.parametrize("estimator", ["kl", "finite_difference"])
@pytest.mark.parametrize("name", SETTINGS)
def test_bf16_differences_are_right_or_nan(name: str, estimator: str) -> None:
    found = rows(name, "bf16-mixed", BF16)[estimator]
    values = [row for row in found if math.isfinite(row.distance)]
    assert all(abs(row.distance) <= 0.1 for row in values), max(values, key=lambda row: abs(row.distance))
    if estimator == "kl":
        # NaN is not an excuse: the symmetric KL has a value at most steps.
        assert len(values) >= len(found) / 2


@pytest.mark.parametrize("estimator", ["kl", "finite_difference"])
def test_reported_errors_are_neither_boasts_nor_excuses(estimator: str) -> None:
    """Nine in ten true errors lie within three reported ones, and the median report is below 5 % in float32."""
    found = [row for name in SETTINGS for row in rows(name, "32-true", tuple(SINGLE))[estimator]]
    within = sum(abs(row.distance) <= 3.0 * row.reported for row in found)
    assert within >= 0.9 * len(found)
    assert sorted(row.reported for row in found)[len(found) // 2] < 0.05


def test_float32_evaluations_of_a_bf16_run() -> None:
    """dᵀGd and dᵀHd as precise as in a float32 run; gᵀd is still that of the bf16 backward: it is multiplied out."""
    network = mlp(64, 24, 10, dtype=torch.float32)
    module = Classifier(network, lambda m: torch.optim.SGD(m.parameters(), lr=0.2))
    monitor = DirectionalCurvatureMonitor(every_n_train_steps=1, probe_precision="32-true")
    outcome = run(module, digits(64, 12), monitor, precision="bf16-mixed")
    for index, step in enumerate(outcome.steps):
        truth = classification_reference(network, step.parts, step.before, step.after)
        row = outcome.capture.rows[index]
        scale = row["curvature/descent"] * step.lr**2
        assert row["curvature/lambda_kl"] * scale == pytest.approx(truth.gauss_newton, rel=SINGLE["kl"])
        assert row["curvature/lambda_fd"] * scale == pytest.approx(truth.hessian, rel=SINGLE["finite_difference"])


@pytest.mark.parametrize("make", [Attending, convolving])
@pytest.mark.thinned(2)
def test_the_error_of_kl_covers_the_true_one(make: Callable[[], nn.Module]) -> None:
    """Nine in ten, of networks whose outputs bend in different ways, and not ten times too large in the median."""
    torch.manual_seed(0)
    module = Classifier(make(), lambda m: torch.optim.Adam(m.parameters(), lr=1e-3))
    outcome = run(module, digits(64, 60), DirectionalCurvatureMonitor(every_n_train_steps=1))
    ratios = []
    for index, step in enumerate(outcome.steps):
        truth, row = (
            classification_reference(module.network, step.parts, step.before, step.after),
            outcome.capture.rows[index],
        )
        quadratic = row["curvature/lambda_kl"] * truth.descent * row["curvature/two_over_lr"] ** -1 * 2.0
        ratios.append(row["curvature_diagnostics/lambda_kl_error"] / abs(quadratic / truth.gauss_newton - 1.0))
    assert sum(ratio >= 1.0 for ratio in ratios) >= 0.9 * len(ratios)
    assert sorted(ratios)[len(ratios) // 2] <= 10.0


class Coarse(nn.Module):
    """Computes a part of its forward in a coarser type than that of its parameters."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.inner, self.head = how, nn.Linear(64, 24), nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                return self.head(torch.tanh(self.inner(x))).float()
        return self.head(torch.tanh(self.inner(x).bfloat16().to(x.dtype)))


def within_errors(outcome: Any, of_exact: float = 0.0) -> int:
    """Check that each value of the pair is within three reported errors of the exact products; return how many are."""
    known = 0
    for row in outcome.capture.rows.values():
        for key, exact in (("lambda_kl", "lambda_gn"), ("lambda_fd", "lambda_dir")):
            value, truth = row[f"curvature/{key}"], row[f"curvature/{exact}"]
            if math.isfinite(value):
                known += 1
                error = row[f"curvature_diagnostics/{key}_error"] * abs(value)
                assert abs(value - truth) <= 3.0 * error + of_exact * abs(truth)
    return known


def float32_loss(z: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(z.float(), y)


def converted_loss(z: Tensor, y: Tensor) -> Tensor:
    return float32_loss(z, y).double()


@pytest.mark.parametrize("loss", [float32_loss, converted_loss])
def test_a_loss_that_is_coarser_than_its_outputs(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    """In a run in float64: errors of float32, and never wrong values with those of float64."""
    torch.manual_seed(0)
    module = Classifier(mlp(64, 24, 10), lambda m: torch.optim.SGD(m.parameters(), lr=0.2), loss)
    estimators = ("hvp", "kl", "finite_difference", "gauss_newton")
    monitor = DirectionalCurvatureMonitor(estimators=estimators, every_n_train_steps=1)
    batches = [(x.double(), y) for x, y in digits(64, 40)]
    outcome = run(module, batches, monitor, precision="64-true")
    assert within_errors(outcome) >= 76  # all but a few at the start


@pytest.mark.parametrize("how", ["autocast", "cast"])
def test_types_inside_of_a_step_are_seen(how: str) -> None:
    """Values of the pair are within three reported errors of the exact products, or NaN; some are there."""
    torch.manual_seed(0)
    module = Classifier(Coarse(how), lambda m: torch.optim.SGD(m.parameters(), lr=0.2))
    estimators = ("hvp", "kl", "finite_difference", "gauss_newton")
    monitor = DirectionalCurvatureMonitor(estimators=estimators, every_n_train_steps=1)
    outcome = run(module, digits(64, 40), monitor)
    # bf16 rounds the exact products themselves, by 2^-9 a term.
    assert within_errors(outcome, of_exact=2.0**-6) > 10
