"""A run with a monitor is the run without it, bit for bit: module, optimizer, data and random numbers."""

from __future__ import annotations

import contextlib
import functools
import io
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_curvature import CurvatureWarning
from tests.helpers.habits import HABITS, Habitual
from tests.helpers.runs import classification
from tests.helpers.setups import SETUPS, unwatched
from tests.helpers.traps import DATA, Boom, Collate
from tests.helpers.witness import Record, assert_same, copies, frozen, watch
from tests.testers.family import FamilyTester, Options, Trap


class EffectTester(FamilyTester):
    """Set-ups, habits of steps, data that draws, and measurements that fail."""

    def cases(self) -> dict[str, Mapping[str, Any]]:
        """Return set-ups, habits, loaders and traps, each under every variant of the monitor."""
        family = self.family
        return {
            # One that draws no numbers and has state.
            "setup": {name: pytest.param(name, marks=pytest.mark.check) if name == "adam" else name for name in SETUPS},
            "variant": {name or "all": make for name, make in family.variants.items()},
            "habit": {name: name for name in HABITS},
            "habit_variant": {name or "all": make for name, make in family.habits.items()},
            "data": {name: name for name in DATA},
            "reader": family.reads,
            "trap": family.traps,
        }

    def assert_measured(self, follow: Any, watched: Record, name: str) -> None:
        """What never ran cannot have disturbed anything."""
        logged = self.family.measured(follow) if self.family.measured else set(self.family.numbers)
        for key in logged - self.family.missing(name):
            values = watched.curve(key)
            assert len(values) > 1, key
            finite = [math.isfinite(value) for value in values]
            always = self.family.always and name not in self.family.exceptions
            assert key in self.family.uncertain or (all if always else any)(finite), key

    @pytest.mark.filterwarnings("ignore::lightning_curvature.CurvatureWarning", "ignore:sigma must be small enough")
    @pytest.mark.thinned(5)
    def test_same_run(self, setup: str, variant: Callable[[str, Record], Options]) -> None:
        plain = unwatched(setup)
        follow = self.family.make(**variant(setup, plain))
        watched = SETUPS[setup].run(follow)
        assert_same(plain, watched)
        self.assert_measured(follow, watched, setup)

    @pytest.mark.filterwarnings("ignore::lightning_curvature.CurvatureWarning")
    @pytest.mark.thinned(5)
    def test_steps_with_habits(
        self, habit: str, habit_variant: Callable[[str], Options], capsys: pytest.CaptureFixture[str]
    ) -> None:
        plain, printed = _habitual(habit)
        capsys.readouterr()
        follow = self.family.make(**habit_variant(habit))
        watched = _watch_habit(habit, follow)
        assert capsys.readouterr().out == printed
        assert_same(plain, watched)
        self.assert_measured(follow, watched, habit)

    @pytest.mark.filterwarnings("ignore::lightning_curvature.CurvatureWarning", "ignore:sigma must be small enough")
    @pytest.mark.thinned(5)
    def test_data_is_read_as_if_nobody_else_did(self, data: str, reader: Any) -> None:
        make, options = reader
        trainer = tuple(self.family.read_trainer.items())
        plain, generators = _read(data, make, trainer)
        follow = self.family.make(**options())
        watched, generators_too = _read.__wrapped__(data, make, trainer, follow)
        assert_same(plain, watched)
        assert generators == generators_too
        self.assert_measured(follow, watched, data)

    @pytest.mark.filterwarnings("ignore:BatchNorm", "ignore:noise_")
    @pytest.mark.thinned(5)
    def test_failing_measurement(self, trap: Trap) -> None:
        """It is NaN, said once, and training goes on; later ones are made."""
        follow = self.family.make(**({"every_n_train_steps": 1} | dict(trap.options)))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with trap.around():
                watched = watch(lambda: trap.module(True), trap.data, follow)
        assert_same(watch(lambda: trap.module(False), trap.data, None), watched)
        said = [str(w.message) for w in caught if issubclass(w.category, CurvatureWarning)]
        notes = ("BatchNorm", "noise_")
        assert [text for text in said if not text.startswith(notes)] == [f"{self.family.name} logs NaN: Boom: trapped"]
        lost = set(self.family.numbers) if trap.lost is None else trap.lost
        seen = [key for key in self.family.numbers if watched.curve(key)]
        assert set(seen) & lost
        for key in seen:
            first, *rest = watched.curve(key)
            assert math.isnan(first) == (key in lost), key
            assert len(rest) >= 2
            assert trap.later in (None, len(rest))
            excused = self.family.missing("trap") | self.family.uncertain
            assert all(math.isfinite(value) for value in rest) or key in excused, key

    @pytest.mark.filterwarnings("ignore:BatchNorm", "ignore:noise_")
    def test_raising_leaves_the_run_as_it_was(self, trap: Trap) -> None:
        """With on_error="raise" the error ends the run at the very θ_t, modes, flags and counters the step found."""
        kept, module = Kept(), trap.module(True)
        follow = self.family.make(**({"every_n_train_steps": 1} | dict(trap.options) | {"on_error": "raise"}))
        with trap.around(), pytest.raises(Boom):
            watch(lambda: module, trap.data, follow, lambda: [kept])
        assert kept.state == kept.of(module)
        assert not {"training_step", "forward", "log"} & set(vars(module))
        # Nothing of the run is held on to.
        assert follow._objective is None
        assert getattr(follow, "_data", None) is None
        assert not getattr(follow, "_calls", [])


class Kept(pl.Callback):
    """All that a batch begins with."""

    state: Any = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.state = self.of(pl_module)

    def of(self, module: Any) -> Any:
        """What a measurement could leave changed."""
        flags = [(p.requires_grad, p.grad) for p in module.parameters()]
        modes = [m.training for m in module.modules()]
        optimizer = module.optimizers().state_dict()
        return frozen([module.state_dict(), flags, modes, module.count, module.seen, optimizer, torch.get_rng_state()])


def _watch_habit(name: str, monitor: pl.Callback | None) -> Record:
    return watch(lambda: Habitual(HABITS[name]), lambda: copies(classification(4)), monitor, max_epochs=2)


@functools.cache
def _habitual(name: str) -> tuple[Record, str]:
    """The unwatched run and what it printed, made once."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        record = _watch_habit(name, None)
    return record, printed.getvalue()


@functools.cache
def _read(name: str, make: Any, trainer: Any, monitor: pl.Callback | None = None) -> tuple[Record, Any]:
    """A run on data that draws, and what is left in the loader; the unwatched one is made once."""
    loader = DATA[name]()
    loader.collate_fn = Collate()
    record = watch(make, lambda: loader, monitor, **dict(trainer))
    return record, frozen([loader.generator, vars(loader.dataset), vars(loader.collate_fn)])
