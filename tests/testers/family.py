"""Description of a family of monitors: all that the testers must know of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import lightning.pytorch as pl
import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_curvature.monitors.base import Monitor
from tests.helpers.runs import batched_samples
from tests.helpers.witness import Record

Options = Mapping[str, Any]
Make = Callable[[], Any]


@dataclass(frozen=True)
class Misfit:
    """A fit that must be refused before its first step.

    Attributes:
        module: makes the module.
        options: of the monitor.
        sentence: pattern of the error.
        data: makes what ``fit`` is given.
        before_data: whether it is found before training starts, where data is read; None where that is not promised.
        trainer: options of the Trainer.
        error: its kind.
    """

    module: Callable[[], pl.LightningModule]
    options: Options
    sentence: str
    data: Make = batched_samples
    before_data: bool | None = None
    trainer: Options = field(default_factory=dict)
    error: type[Exception] | tuple[type[Exception], ...] = (MisconfigurationException, ValueError)


@dataclass(frozen=True)
class Trap:
    """A module that raises ``Boom`` in the first measurement.

    Attributes:
        module: makes the module; one that never fails where the argument is false.
        lost: keys out of ``Family.numbers`` that are NaN then; None for all.
        options: of the monitor, beside ``Family.quick``.
        data: makes the loader.
        around: makes a context in which the module fails.
        later: measurements after the one that fails; None for two or more.
    """

    module: Callable[[bool], pl.LightningModule]
    lost: frozenset[str] | None = None
    options: Options = field(default_factory=dict)
    data: Make = batched_samples
    around: Callable[[], AbstractContextManager[None]] = nullcontext
    later: int | None = None


@dataclass(frozen=True, kw_only=True)
class Family:
    """A monitor and what it promises.

    Attributes:
        monitor: its class.
        quick: options of a run that measures all quantities, with as few evaluations as may be.
        few: options of a run that measures ``watched`` and little else; at every second step, and not at the end.
        numbers: keys that must be finite in a run of ``quick``: always, or now and then as ``always`` says.
        uncertain: numbers that are logged at each measurement, finite or not.
        measured: keys out of ``numbers`` that a monitor logs, where its options leave some out; None for all.
        watched: the key of ``few`` that a stopper or a checkpoint watches; positive.
        shown: keys of ``few`` on the progress bar; none where the monitor has no such option.
        selections: options, and the keys that a run with them logs.
        undefined: keys that are NaN by their definition.
        charts: options, TensorBoard's charts (keys by title, all without the prefix), and the keys over their edges.
        pictures: options of a run that draws, the images it writes, and what is said without matplotlib.
        bad_arguments: options, and the pattern of the error.
        misfits: by name.
        commands: options of the constructor as a YAML file holds them, and the keys that a run with them logs.
        variants: options under which the monitor watches one of ``SETUPS``, by variant: a function of its name and of
            its unwatched run.
        habits: the same for one of ``HABITS``: a function of its name.
        exceptions: set-ups and habits in which the numbers are finite but now and then.
        missing: numbers that a set-up or habit need not give: a function of its name.
        reads: modules, and the options under which all of ``DATA`` is read without being noticed.
        read_trainer: options of the Trainer in these runs.
        traps: by name.
        compared: gives names, found and expected values, and relative tolerances of a run beside its oracle.
        accumulations: batches of a step in the runs that are resumed, one run each.
        precision: of the runs that are resumed.
        learned: key of what such a run learns; None where nothing changes along it.
        counted: options, and forwards of the network in each of four batches beyond the step's own.
        rank_options: options, beside ``few``, under which two ranks give the numbers of one.
        follows_steps: whether it measures along a step, which an evaluation by hand must make.
        collectives: of such a monitor in each of three batches; None where a search decides, which other tests count.
    """

    monitor: type[Monitor]
    quick: Options
    few: Options
    numbers: tuple[str, ...]
    always: bool
    uncertain: frozenset[str] = frozenset()
    measured: Callable[[Any], set[str]] | None = None
    watched: str
    shown: tuple[str, ...]
    selections: Sequence[tuple[Options, set[str]]]
    undefined: frozenset[str] = frozenset()
    charts: Sequence[tuple[Options, dict[str, list[str]], list[str]]] = ()
    pictures: tuple[Options, tuple[str, ...], str] | None = None
    bad_arguments: Sequence[tuple[Options, str]]
    misfits: Mapping[str, Misfit]
    commands: Sequence[tuple[Options, set[str]]]
    variants: Mapping[str, Callable[[str, Record], Options]] = field(default_factory=lambda: {"": lambda *_: {}})
    habits: Mapping[str, Callable[[str], Options]] = field(default_factory=lambda: {"": lambda _: {}})
    exceptions: frozenset[str] = frozenset()
    missing: Callable[[str], set[str]] = lambda name: set()
    reads: Mapping[str, tuple[Callable[[], pl.LightningModule], Callable[[], Options]]] = field(default_factory=dict)
    read_trainer: Options = field(default_factory=dict)
    traps: Mapping[str, Trap] = field(default_factory=dict)
    compared: Callable[[], Iterable[tuple[str, float, float, float]]]
    accumulations: Sequence[int] = (1,)
    precision: Literal["64-true", "32-true"] = "64-true"
    learned: str | None = None
    counted: Sequence[tuple[Options, list[int]]]
    rank_options: Options = field(default_factory=dict)
    collectives: list[int] | None = None
    follows_steps: bool = False

    @property
    def name(self) -> str:
        """Of the class."""
        return self.monitor.__name__

    def make(self, **options: Any) -> Any:
        """Make a monitor of all quantities."""
        return self.monitor(**(dict(self.quick) | options))

    def make_few(self, **options: Any) -> Any:
        """Make a monitor of ``watched``."""
        return self.monitor(**({"every_n_train_steps": 2, "on_error": "raise"} | dict(self.few) | options))


def numbered(cases: Iterable[Any]) -> dict[str, Any]:
    """Return cases by the beginning of their first item."""
    return {f"{str(case[0])[:60]}-{i}": case for i, case in enumerate(cases)}


class FamilyTester:
    """Base of the testers: a subclass names its family, and each test is made for all cases of its argument."""

    family: Family

    def cases(self) -> dict[str, Mapping[str, Any]]:
        """Return cases by name, for each argument of a test that has such."""
        raise NotImplementedError

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Give each test the cases of its arguments."""
        for argument, cases in self.cases().items():
            if argument in metafunc.fixturenames:
                metafunc.parametrize(argument, list(cases.values()), ids=list(cases))
