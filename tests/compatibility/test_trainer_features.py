"""Every monitor beside every feature of the Trainer: the run is what it was, and the values come when they should."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
from torch.utils.data import DataLoader

from tests.compatibility.features import FEATURES, Learner, data, plain
from tests.compatibility.monitors import MONITORS, Kind, each_monitor
from tests.helpers.runs import make_trainer
from tests.helpers.witness import Record, Rows, assert_same, frozen, module_state, random_states


@functools.cache
def alone(name: str, monitor: str) -> Record:
    """A run with one monitor, made once."""
    return FEATURES[name].run(MONITORS[monitor].make())


@pytest.mark.parametrize("monitor", MONITORS)
@pytest.mark.parametrize("name", FEATURES)
# The note on BatchNorm, and Lightning's on shuffling and schedulers.
@pytest.mark.filterwarnings("ignore:BatchNorm", "ignore:You requested to overfit", "ignore:SWA is currently")
@pytest.mark.thinned(10)
def test_features(name: str, monitor: str) -> None:
    feature, kind = FEATURES[name], MONITORS[monitor]
    watched = alone(name, monitor)
    assert_same(plain(name), watched)
    kind.check(watched.logger.rows, feature.steps + feature.begun.get(monitor, ()))


ENTRIES: dict[str, Callable[[pl.Trainer, pl.LightningModule, Any], Any]] = {
    "validate": lambda trainer, module, loader: trainer.validate(module, loader, verbose=False),
    "test": lambda trainer, module, loader: trainer.test(module, loader, verbose=False),
    "predict": lambda trainer, module, loader: trainer.predict(module, DataLoader([x for x, _ in loader], None)),
}


@each_monitor
@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_nothing_to_do_without_fit(entry: Any, kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    def entered(monitor: pl.Callback | None) -> Any:
        pl.seed_everything(3, verbose=False)
        module, logger = Learner(), Rows()
        trainer = make_trainer(*([monitor] if monitor else []), logger=logger)
        found = entry(trainer, module, data()[1])
        return frozen([found, module_state(module), random_states(), trainer.callback_metrics, logger.rows])

    monitor = kind.make()
    monkeypatch.setattr(type(monitor), "measure", lambda *args: pytest.fail("measured"))
    assert entered(None) == entered(monitor)


@each_monitor
@pytest.mark.thinned(5)
def test_two_of_a_kind(kind: Kind) -> None:
    """Each gives what it gives alone."""
    feature = FEATURES["plain"]
    first, second = kind.make(prefix="curvature_a"), kind.make(prefix="curvature_b", every_n_train_steps=2)
    both = feature.run(first, second)
    assert_same(plain("plain"), both)
    (name,) = (name for name, other in MONITORS.items() if other is kind)
    third, second_alone = alone("plain", name), feature.run(kind.make(every_n_train_steps=2))
    for prefix, single, steps in (
        ("curvature_a", third, (0, 3, 6, 9)),
        ("curvature_b", second_alone, (0, 2, 4, 6, 8, 10)),
    ):
        kind.check(both.logger.rows, steps, prefix)
        assert kind.rows(both.logger.rows, prefix) == kind.rows(single.logger.rows)


@pytest.mark.parametrize("name", ["plain", "validation within a window"])
@pytest.mark.thinned(2)
def test_all_together(name: str) -> None:
    """Each gives what it gives alone, in whatever order they stand."""
    feature = FEATURES[name]
    for order in (list(MONITORS), list(MONITORS)[::-1]):
        first, *others = (MONITORS[monitor].make() for monitor in order)
        together = feature.run(first, *others)
        assert_same(plain(name), together)
        for monitor, kind in MONITORS.items():
            kind.check(together.logger.rows, feature.steps)
            assert kind.rows(together.logger.rows) == kind.rows(alone(name, monitor).logger.rows)
