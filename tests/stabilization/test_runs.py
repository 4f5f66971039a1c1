"""A run with StabilizationMonitor is the run without it, bit for bit, also where a measurement fails."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from lightning_curvature import CurvatureWarning, StabilizationMonitor
from lightning_curvature.stabilization.options import QUANTITIES
from tests.helpers.habits import HABITS, Habitual
from tests.helpers.runs import Classifier, classification
from tests.helpers.setups import SETUPS, Measured, sgd, with_batchnorm, with_dropout
from tests.helpers.stabilization import Trap, Trapped, monitor, samples
from tests.helpers.traps import DATA, Boom, Collate, Hooked
from tests.helpers.witness import (
    Record,
    assert_same,
    copies,
    frozen,
    watch,
)


def assert_measured(watched: Record, which: Callable[[Any], bool] = all) -> None:
    """The monitor did measure: what never ran cannot have disturbed anything."""
    for key in QUANTITIES:
        values = watched.curve(key)
        assert len(values) > 1, key
        assert which(math.isfinite(value) for value in values), key


class Named(Dataset[Any]):
    """Samples of the set-up whose batches are dictionaries."""

    def __init__(self) -> None:
        self.x, self.y = classification(1, 8)[0]

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input": (self.x[index], "name"), "label": self.y[index]}


OWN_SAMPLES: dict[str, Callable[[], DataLoader[Any]]] = {
    "dict batch": lambda: DataLoader(Named(), batch_size=4),
    "float32": lambda: samples(dtype=torch.float32),
    "bf16-mixed": lambda: samples(dtype=torch.float32),
}


@pytest.mark.parametrize("name", SETUPS)
@pytest.mark.filterwarnings("ignore:sigma must be small enough")
def test_same_run(name: str) -> None:
    """Before some steps, at times of its own, and after the last one."""
    follow = monitor(
        every_n_train_steps=4, at_steps=(1,), probe_dataloader=OWN_SAMPLES.get(name, samples)(), on_error="raise"
    )
    watched = SETUPS[name].run(follow)
    assert_same(SETUPS[name].run(None), watched)
    assert_measured(watched)


@pytest.mark.parametrize("make", [with_dropout, with_batchnorm], ids=["dropout", "running statistics"])
@pytest.mark.filterwarnings("ignore:sigma must be small enough", "ignore:BatchNorm")
def test_modules_in_training_mode(make: Any) -> None:
    """Masks are drawn, and statistics would move; single samples leave BatchNorm1d nothing to normalize by."""
    run = lambda follow: watch(lambda: Classifier(make(), sgd), samples, follow)  # noqa: E731
    follow = monitor(probe_mode="train")
    if make is with_dropout:
        watched = run(follow)
        assert_measured(watched)
    else:
        with pytest.warns(CurvatureWarning, match="logs NaN: ValueError: Expected more than 1 value per channel"):
            watched = run(follow)
    assert_same(run(None), watched)


@pytest.mark.parametrize("name", HABITS)
@pytest.mark.filterwarnings("ignore::lightning_curvature.CurvatureWarning")
def test_steps_with_habits(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    def run(follow: StabilizationMonitor | None) -> tuple[Record, str]:
        record = watch(lambda: Habitual(HABITS[name]), lambda: copies(classification(3)), follow)
        return record, capsys.readouterr().out

    (plain, printed), (watched, printed_too) = run(None), run(monitor(probe_dataloader=samples()))
    assert_same(plain, watched)
    assert printed == printed_too
    # A parameter that the repeated step takes the gradient from cannot be measured.
    assert_measured(watched, any if name == "changes_modes_and_flags" else all)


@pytest.mark.parametrize("make", [Hooked, Measured])
@pytest.mark.parametrize("name", DATA)
@pytest.mark.filterwarnings("ignore:sigma must be small enough")
def test_data_is_read_as_if_nobody_else_did(name: str, make: Any) -> None:
    def run(follow: StabilizationMonitor | None) -> tuple[Record, Any]:
        loader = DATA[name]()
        loader.collate_fn = Collate()
        record = watch(make, lambda: loader, follow)
        return record, frozen([loader.generator, vars(loader.dataset)])

    (plain, generators), (watched, generators_too) = run(None), run(monitor())
    assert_same(plain, watched)
    assert generators == generators_too
    assert_measured(watched)


STAGES = ("direct, full space", "traces, full space", "subspace", "coefficients", "direct")


@pytest.mark.parametrize("stage", STAGES)
def test_failing_step(stage: str, trapped: Callable[[str | None], Trapped]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        watched = watch(lambda: trapped(stage), samples, monitor(every_n_train_steps=1))
    assert_same(watch(lambda: trapped(None), samples, None), watched)
    said = [str(w.message) for w in caught if issubclass(w.category, CurvatureWarning)]
    assert said == ["StabilizationMonitor logs NaN: Boom: trapped"]
    for key in QUANTITIES:
        for name in (key, f"{key}_stderr"):
            first, *rest = watched.curve(name)
            assert math.isnan(first), name
            # Before the second step, and at the end.
            assert len(rest) == 2
            assert all(math.isfinite(value) for value in rest), name


@pytest.mark.parametrize("stage", STAGES)
def test_failing_at_the_end_of_fit(stage: str, trapped: Callable[[str | None], Trapped]) -> None:
    class Late(pl.Callback):
        def on_train_end(self, *args: Any) -> None:
            Trap.stage = stage

    follow = monitor(every_n_train_steps=None)
    with pytest.warns(CurvatureWarning, match="StabilizationMonitor logs NaN: Boom: trapped"):
        watched = watch(lambda: trapped(None), samples, follow, lambda: [Late()])
    assert_same(watch(lambda: trapped(None), samples, None), watched)
    assert [math.isnan(value) for value in watched.curve("delta_2")] == [True]
    assert follow.result is None


@pytest.mark.parametrize("stage", STAGES)
def test_raising_leaves_the_run_as_it_was(stage: str, trapped: Callable[[str | None], Trapped]) -> None:
    """With on_error="raise" the error ends the run at the very θ_t, modes, flags and counters that the step found."""

    class Kept(pl.Callback):
        state: Any = None

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            self.state = self.of(pl_module)

        def of(self, module: Any) -> Any:
            flags = [(p.requires_grad, p.grad) for p in module.parameters()]
            modes = [m.training for m in module.modules()]
            optimizer = module.optimizers().state_dict()
            return frozen(
                [module.state_dict(), flags, modes, module.count, module.seen, optimizer, torch.get_rng_state()]
            )

    kept, module = Kept(), trapped(stage)
    follow = monitor(on_error="raise")
    with pytest.raises(Boom):
        watch(lambda: module, samples, follow, lambda: [kept])
    assert kept.state == kept.of(module)
    assert not {"training_step", "forward", "log"} & set(vars(module))
    # Nothing of the run is held on to.
    assert follow._data is None
    assert follow._objective is None
