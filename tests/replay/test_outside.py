"""Class attributes and globals that the user's code names come back with the objects whose code it is."""

from __future__ import annotations

import textwrap
import types
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from lightning_curvature.replay import outside
from lightning_curvature.replay.snapshot import Snapshot

CODE = """
    import settings

    steps, seen, table = 0, [], {}

    class Store:
        total = 0
        names = []

    def helper():
        table["helper"] = len(seen)

    class Module(Base):
        shared = {}

        @property
        def level(self):
            return settings.level

        def step(self):
            global steps, fresh
            steps += 1
            fresh = steps
            seen.append(steps)
            helper()
            Store.total += 1
            Store.names.append("a")
            Store.added = 1
            type(self).shared["a"] = 1
            type(self).count = 1
            settings.level += 1
            settings.marks.append(1)
            return [steps, list(seen), dict(table), Store.total, list(Store.names), self.shared, settings.level]
"""

# On the path and not installed: a registry of functions and tables, which name each other.
PACKAGE = """
    REGISTRY, TABLE = {}, {}
    for number in range(20_000):
        TABLE[number] = [number, {"a": number}]
        exec(f"def f{number}(): return REGISTRY, TABLE, f{number + 1}", globals())
        REGISTRY[number] = globals()[f"f{number}"]
    REGISTRY["get"] = lambda: len(TABLE)
"""


STEP = """
    import package

    count, deep = 0, [[[0]]]

    class Module:
        def step(self):
            package.REGISTRY[0], package.TABLE
            return inner()

    def inner():
        global count
        count += 1
        deep[0][0][0] += 1
        return [count, [[list(deep[0][0])]], farther()]

    def farther():
        return farthest()

    def farthest():
        State.total += 1
        return State.total

    class State:
        total = 0
"""


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path, whose modules are the user's."""
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("settings", "user_code", "package"):
        monkeypatch.delitem(__import__("sys").modules, name, raising=False)
    return tmp_path


@pytest.fixture
def user(path: Path) -> Any:
    """Modules in files of the user's."""
    (path / "settings.py").write_text("level, marks = 3, []\n")
    (path / "user_code.py").write_text("from torch.nn import Module as Base\n" + textwrap.dedent(CODE))
    return __import__("user_code")


def test_all_that_a_step_names_comes_back(user: Any) -> None:
    module = user.Module()
    before = {name: value for name, value in vars(user).items() if not name.startswith("__")}
    first = Snapshot([module])
    once = module.step()
    assert once == [1, [1], {"helper": 1}, 1, ["a"], {"a": 1}, 4]
    first.restore()
    assert {name: value for name, value in vars(user).items() if not name.startswith("__")} == before
    assert not hasattr(user.Store, "added")
    assert not hasattr(type(module), "count")
    assert (user.settings.level, user.settings.marks) == (3, [])
    assert module.step() == once
    first.restore()


def test_code_of_others_is_not_followed() -> None:
    """Of torch, of the standard library and of this package."""
    assert outside.classes_of(nn.Linear) == ()
    assert outside.classes_of(type("Own", (nn.Linear,), {}))[0].__name__ == "Own"
    restorers, found = outside.outside(textwrap.dedent)
    assert (restorers, found) == ([], [])
    restorers, found = outside.outside(outside.outside)
    assert (restorers, found) == ([], [])


def test_constants_of_a_class_are_not_set_where_they_have_not_changed() -> None:
    class Meta(type):
        def __setattr__(cls, name: str, value: object) -> None:
            raise TypeError("frozen")

    Frozen = Meta("Frozen", (), {"level": 1, "names": []})
    Snapshot([Frozen(), types.SimpleNamespace(one=Frozen)]).restore()


def test_a_large_package_on_the_path_is_not_walked_through(path: Path) -> None:
    """What the step's own code names comes back beside it, at any depth; the walk has a bound."""
    (path / "package.py").write_text(textwrap.dedent(PACKAGE))
    (path / "user_code.py").write_text(textwrap.dedent(STEP))
    user = __import__("user_code")
    module = user.Module()
    saved: list[Any] = []
    first = Snapshot([module], prepare=saved.append)
    assert len(saved) < 10_000  # of 60 000
    once = module.step()
    assert once == [1, [[[1]]], 1]
    first.restore()
    assert module.step() == once
