"""Options are stated once: constructors take their defaults from them, and monitors read them."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
from typing import Any, get_type_hints

import pytest

from lightning_curvature import callbacks
from lightning_curvature.monitors.base import Monitor
from lightning_curvature.monitors.options import MonitorOptions

MONITORS: list[type[Monitor]] = [getattr(callbacks, name) for name in callbacks.__all__]
NEEDED: dict[str, dict[str, Any]] = {"NoiseCovarianceMonitor": {"parameter": "weight"}}


def made(kind: type[Monitor], **options: Any) -> Any:
    return kind(**NEEDED.get(kind.__name__, {}), **options)  # type: ignore[arg-type, call-arg]


def options_of(kind: type[Monitor]) -> type[MonitorOptions]:
    return get_type_hints(kind)["options"]


@pytest.mark.parametrize("kind", MONITORS)
def test_a_constructor_takes_each_option_by_keyword_with_its_default(kind: type[Monitor]) -> None:
    arguments = list(inspect.signature(kind.__init__).parameters.values())[1:]
    fields = {field.name: field.default for field in dataclasses.fields(options_of(kind))}
    assert all(argument.kind is argument.KEYWORD_ONLY for argument in arguments)
    assert {argument.name for argument in arguments} <= fields.keys()
    for argument in arguments:
        if argument.default is argument.empty:
            assert fields[argument.name] is dataclasses.MISSING
        else:
            assert argument.default == fields[argument.name], argument.name
        # Editors and help() show what each is for.
        assert f"        {argument.name}: " in (kind.__doc__ or ""), argument.name


@pytest.mark.parametrize("kind", MONITORS)
def test_options_are_frozen_and_read_from_the_monitor(kind: type[Monitor]) -> None:
    monitor = made(kind, prefix="mine", every_n_train_steps=7)
    assert type(monitor.options) is options_of(kind)
    assert (monitor.prefix, monitor.every_n_train_steps) == ("mine", 7)
    for name in inspect.signature(kind.__init__).parameters.keys() - {"self"}:
        assert getattr(monitor, name) is getattr(monitor.options, name)
    with pytest.raises(dataclasses.FrozenInstanceError):
        monitor.options.prefix = "yours"
    with pytest.raises(AttributeError, match=f"'{kind.__name__}' object has no attribute 'no_such_option'"):
        _ = monitor.no_such_option


@pytest.mark.parametrize("kind", MONITORS)
def test_a_monitor_can_be_copied_with_its_options(kind: type[Monitor]) -> None:
    monitor = made(kind, prefix="mine")
    for again in (copy.deepcopy(monitor), pickle.loads(pickle.dumps(monitor))):
        assert again.options == monitor.options
        # As a text: before setup no two monitors have equal keys.
        assert str(again.state_key) == str(monitor.state_key)
