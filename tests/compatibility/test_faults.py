"""A fault at any line of the package, once, costs a measurement; the run goes on as if nobody had watched it."""

from __future__ import annotations

import functools
import random
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_curvature import (
    BatchSharpnessMonitor,
    DirectionalCurvatureMonitor,
    HessianSpectrumMonitor,
    NoiseCovarianceMonitor,
    StabilizationMonitor,
)
from tests.helpers.faults import Fault, Line, Tracer, modes
from tests.helpers.habits import HABITS, Habitual
from tests.helpers.runs import classification
from tests.helpers.stabilization import samples
from tests.helpers.witness import (
    Record,
    Witness,
    assert_same,
    copies,
    difference,
    module_state,
    random_states,
    watch,
)

# These call what the user has given, a loader's copy or an optimizer's step, and say by name that it cannot be used.
OF_THE_USER = {"fresh_copy", "_call"}
EVERY = {"every_n_train_steps": 3}
MONITORS: dict[str, Callable[[], pl.Callback]] = {
    "directional": lambda: DirectionalCurvatureMonitor(
        estimators=("hvp", "kl", "finite_difference", "critical"), every_n_train_steps=2
    ),
    "spectrum": lambda: HessianSpectrumMonitor(
        quantities=("lambda_max", "hessian_trace", "preconditioned_lambda_max"), probe_samples=16, **EVERY
    ),
    "batch_sharpness": lambda: BatchSharpnessMonitor(
        quantities=("batch_sharpness", "gni", "lambda_gen"), num_batches=8, min_batches=4, **EVERY
    ),
    "stabilization": lambda: StabilizationMonitor(
        sample_sizes=(2,), subspace_dim=2, draws=3, candidates=2, probe_dataloader=samples(), every_n_train_steps=3
    ),
    "noise": lambda: NoiseCovarianceMonitor(parameter="network.0.weight", **EVERY),
}


def run(
    make: Callable[[], pl.Callback] | None, tracer: Tracer | None = None, made: Callable[[Habitual], object] = id
) -> Record:
    follow = make() if make else None

    def make_module() -> Habitual:
        made(module := Habitual(HABITS["appends_and_counts"]))
        return module

    sys.settrace(tracer)
    try:
        return watch(make_module, lambda: copies(classification(4)), follow)
    finally:
        sys.settrace(None)


@functools.cache
def unwatched() -> Record:
    return run(None)


@functools.cache
def lines(family: str) -> dict[Line, int]:
    tracer = Tracer()
    run(MONITORS[family])  # what is looked up once in a process is found from here on
    assert_same(unwatched(), run(MONITORS[family], tracer))
    return dict(sorted(tracer.visits.items()))


def harm(family: str, count: int, seed: int) -> list[str]:
    """Inject faults at random lines, each at a random visit, and return what became of the runs that were harmed."""
    draw, harmed, known, before = random.Random(seed), [], lines(family), modes()
    for _ in range(count):
        line = draw.choice(list(known))
        tracer = Tracer((line, draw.randint(1, known[line])))
        where = f"seed {seed}, {Path(line[0]).name}:{line[1]}"
        try:
            assert_same(unwatched(), run(MONITORS[family], tracer))
        except Fault:
            harmed.append(f"{where}: ended")
        except MisconfigurationException as error:
            cause = error.__cause__
            if cause is None or traceback.extract_tb(cause.__traceback__)[0].name not in OF_THE_USER:
                harmed.append(f"{where}: {error}")
        except AssertionError as error:
            harmed.append(f"{where}: {error}")
        assert tracer.fired, where
        assert modes() == before, where
    return harmed


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", MONITORS)
@pytest.mark.thinned(5)
def test_faults(family: str) -> None:
    assert harm(family, 6, seed=1) == []


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(2, 6))
@pytest.mark.parametrize("family", MONITORS)
def test_many_faults(family: str, seed: int) -> None:
    assert harm(family, 50, seed) == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", MONITORS)
def test_an_interrupt_stops_at_once(family: str) -> None:
    """In the midst of what is measured: Lightning ends the fit, and the module is as the monitor found it."""
    line = max(lines(family), key=lambda one: lines(family)[one] * ("objective" in one[0]))
    tracer, modules, before = Tracer((line, lines(family)[line]), KeyboardInterrupt), list[Habitual](), modes()
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(MONITORS[family], tracer, modules.append)
    assert tracer.fired
    assert modes() == before
    (module,) = modules
    witness = next(one for one in module.trainer.callbacks if isinstance(one, Witness))  # it stands before the monitor
    _, noted = witness.trail[-1]
    now = module_state(module) | {"random states": random_states()}
    assert difference({key: noted[key] for key in now}, now) is None
