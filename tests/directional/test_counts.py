"""Extra passes of a measured step, counted at the network: those that the documentation promises, and no others."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

from lightning_curvature import DirectionalCurvatureMonitor
from tests.helpers.counting import on_forward
from tests.helpers.runs import Batch, Classifier, classification, mlp, run

FORWARDS = {
    ("kl",): 1,
    ("finite_difference",): 2,
    ("kl", "finite_difference"): 2,
    ("hvp",): 1,
    ("gauss_newton",): 1,
    ("kl", "finite_difference", "hvp", "gauss_newton"): 4,
}
EVERY = 3
STEPS = 4
MEASURED = (0, 3)


class Counter(pl.Callback):
    """Counts passes through the network: forward, with tangents, with graphs, and backward; one entry a step."""

    def __init__(self, network: nn.Module) -> None:
        self.forwards: list[int] = []
        self.with_tangents: list[int] = []
        self.with_graph: list[int] = []
        self.backwards: list[int] = []
        self.rows: list[list[int]] = [self.forwards, self.with_tangents, self.with_graph, self.backwards]
        self._open = False
        on_forward(network, self._seen)

    def on_train_batch_start(self, *args: Any) -> None:
        if not self._open:
            for row in self.rows:
                row.append(0)
            self._open = True

    def on_before_optimizer_step(self, *args: Any) -> None:
        self._open = False  # what comes until the next batch starts belongs to this step

    def _seen(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.forwards[-1] += 1
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(output).tangent is not None:
            self.with_tangents[-1] += 1
        elif output.requires_grad:
            self.with_graph[-1] += 1
            output.register_hook(self._passed_back)

    def _passed_back(self, gradient: Tensor) -> None:
        self.backwards[-1] += 1


def module() -> Classifier:
    return Classifier(mlp(4, 6, 3), lambda m: torch.optim.SGD(m.parameters(), lr=0.2))


def counted(estimators: tuple[str, ...], accumulate: int = 1, learner: Any = None, **options: Any) -> Counter:
    learner = learner or module()
    counter = Counter(learner.network)
    monitor = DirectionalCurvatureMonitor(
        estimators=estimators,  # type: ignore[arg-type]
        every_n_train_steps=EVERY,
        on_error="raise",
        **options,
    )
    run(learner, classification(STEPS * accumulate), counter, monitor, accumulate_grad_batches=accumulate)
    assert all(len(row) == STEPS for row in counter.rows)
    return counter


def expected(plain: int, extra: int, check: int = 0) -> list[int]:
    """Passes of each step; on the first measured one the step is repeated once to check it."""
    return [plain + (extra if step in MEASURED else 0) + (check if step == 0 else 0) for step in range(STEPS)]


@pytest.mark.parametrize("estimators", FORWARDS)
def test_extra_forwards_of_a_measured_window(estimators: tuple[str, ...]) -> None:
    assert counted(estimators, 2).forwards == expected(2, FORWARDS[estimators] * 2, check=1)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_forward_only_estimators_build_no_graph(accumulate: int) -> None:
    counter = counted(("kl", "finite_difference", "critical"), accumulate)
    assert counter.with_graph == counter.backwards == expected(accumulate, 0)
    assert counter.with_tangents == expected(0, 0)


def test_gauss_newton_is_one_forward_mode_pass() -> None:
    counter = counted(("gauss_newton",))
    assert counter.with_tangents == expected(0, 1)
    assert counter.backwards == expected(1, 0)


def test_hvp_is_one_forward_and_two_backwards() -> None:
    counter = counted(("hvp",))
    assert counter.with_graph == expected(1, 1)
    assert counter.backwards == expected(1, 2)


def test_critical_makes_the_forwards_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_curvature.directional import measurement

    said: list[int] = []
    search = measurement.critical_step

    def noted(*args: Any, **kwargs: Any) -> measurement.CriticalStep:
        found = search(*args, **kwargs)
        said.append(found.forwards)
        return found

    monkeypatch.setattr(measurement, "critical_step", noted)
    counter = counted(("critical",))
    extra = [counter.forwards[step] - 1 - (step == 0) for step in MEASURED]
    assert said == extra
    assert all(3 <= count <= 20 for count in extra)
    assert [n for step, n in enumerate(counter.forwards) if step not in MEASURED] == [1, 1]


def test_critical_stops_at_its_cap() -> None:
    with pytest.warns(UserWarning, match="stopped at critical_max_forwards=3"):
        counter = counted(("critical",), critical_max_forwards=3)
    assert counter.forwards == expected(1, 3, check=1)


@pytest.mark.parametrize("options", [{"probe_precision": "32-true"}, {"objective": "own"}])
def test_one_more_forward_where_the_steps_own_loss_is_of_another_kind(options: dict[str, Any]) -> None:
    def objective(module: Any, batch: Batch) -> dict[str, Tensor]:
        z = module.network(batch[0])
        return {"loss": nn.functional.cross_entropy(z, batch[1]), "outputs": z}

    if "objective" in options:
        options = {"objective": objective}
    assert counted(("kl", "finite_difference"), **options).forwards == expected(1, 3, check=1)


def test_two_monitors_add_their_counts() -> None:
    learner = module()
    counter = Counter(learner.network)
    monitors = [
        DirectionalCurvatureMonitor(estimators=[name], every_n_train_steps=every, prefix=name)  # type: ignore[list-item]
        for name, every in (("kl", 2), ("finite_difference", 3))
    ]
    run(learner, classification(STEPS), counter, *monitors)
    assert counter.forwards == [1 + 1 + 2 + 2, 1, 1 + 1, 1 + 2]


def test_lbfgs_steps_cost_what_others_do() -> None:
    """Its closures run several times a step, with the monitor as without it."""

    def fit(*estimators: str) -> list[int]:
        learner = Classifier(mlp(4, 6, 3), lambda m: torch.optim.LBFGS(m.parameters(), lr=0.1, max_iter=3))
        counter = Counter(learner.network)
        monitors = [DirectionalCurvatureMonitor(estimators=estimators, every_n_train_steps=EVERY)] if estimators else []  # type: ignore[arg-type]
        run(learner, classification(STEPS), counter, *monitors)
        return counter.forwards

    extra = [a - b for a, b in zip(fit("kl", "finite_difference"), fit(), strict=True)]
    assert extra == expected(0, 2, check=1)
