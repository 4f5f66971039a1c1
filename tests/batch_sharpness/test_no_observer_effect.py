"""A run with BatchSharpnessMonitor is the run without it, bit for bit, also where a measurement fails."""

from __future__ import annotations

import math
import warnings
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_curvature import BatchSharpnessMonitor, CurvatureWarning
from lightning_curvature.batch_sharpness.options import QUANTITIES
from tests.helpers.habits import HABITS, Habitual
from tests.helpers.runs import classification
from tests.helpers.setups import SETUPS, Measured
from tests.helpers.traps import DATA, Boom, Hooked, Trapped
from tests.helpers.witness import Record, assert_same, copies, frozen, watch

# Its step needs a closure.
NO_TRIALS = ("lbfgs",)


def monitor(*without: str, **options: Any) -> BatchSharpnessMonitor:
    """All quantities, as few batches as may be: what one of them leaves behind, the next would too."""
    quick: dict[str, Any] = {"num_batches": 4, "min_batches": 4, "tolerance": 0.1, "every_n_train_steps": 2}
    quantities: Any = [name for name in QUANTITIES if name not in without]
    return BatchSharpnessMonitor(**({"quantities": quantities} | quick | options))


def assert_measured(watched: Record, *without: str) -> None:
    """The monitor did measure: what never ran cannot have disturbed anything."""
    for key in QUANTITIES:
        if key not in without:
            values = watched.curve(key)
            assert values, key
            # λ_gen of a handful of batches is now and then uphill.
            assert key == "lambda_gen" or any(math.isfinite(value) for value in values), key


@pytest.mark.parametrize("name", SETUPS)
@pytest.mark.filterwarnings("ignore::lightning_curvature.CurvatureWarning")
def test_same_run(name: str) -> None:
    without = ("lambda_gen",) if name in NO_TRIALS else ()
    watched = SETUPS[name].run(monitor(*without, every_n_train_steps=1 if name == "manual optimization" else 2))  # type: ignore[arg-type]
    assert_same(SETUPS[name].run(None), watched)
    assert_measured(watched, *without)


@pytest.mark.parametrize("name", HABITS)
def test_steps_with_habits(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    def run(follow: BatchSharpnessMonitor | None) -> tuple[Record, str]:
        record = watch(lambda: Habitual(HABITS[name]), lambda: copies(classification(4)), follow)
        return record, capsys.readouterr().out

    (plain, printed), (watched, printed_too) = run(None), run(monitor())
    assert_same(plain, watched)
    assert printed == printed_too
    assert_measured(watched)


@pytest.mark.parametrize(("make", "samples"), [(Hooked, 11), (Measured, 2048)])
@pytest.mark.parametrize("name", DATA)
@pytest.mark.filterwarnings("ignore::lightning_curvature.CurvatureWarning")
def test_data_is_read_as_if_nobody_else_did(name: str, make: Any, samples: int) -> None:
    def run(follow: BatchSharpnessMonitor | None) -> tuple[Record, Any]:
        loader = DATA[name]()
        record = watch(make, lambda: loader, follow, accumulate_grad_batches=2)
        return record, frozen([loader.generator, vars(loader.dataset)])

    # Eleven samples do not make up the two batches of eight of a step.
    sizes = {"batch_size": 8} if samples == 11 else {}
    (plain, generators), (watched, generators_too) = run(None), run(monitor(probe_samples=samples, **sizes))
    assert_same(plain, watched)
    assert generators == generators_too
    assert_measured(watched)


# In which call of training_step the first measurement fails. Batches of 8, 8, 8: whole() of three micro-batches for ∇L
# after the one of the step's own batch, then one call a drawn batch.
CALLS = {"step_sharpness": 1, "full gradient": 3, "first batch": 5, "second batch": 6, "third batch": 7}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore:BatchNorm")
def test_failing_step(name: str) -> None:
    run = lambda follow, trap: watch(lambda: Trapped(trap), lambda: copies(classification(3)), follow)  # noqa: E731
    trap = [CALLS[name]]
    follow = monitor(every_n_train_steps=1, batches_at_once=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        watched = run(follow, trap)
    assert_same(run(None, [0]), watched)
    said = [str(w.message) for w in caught if issubclass(w.category, CurvatureWarning)]
    assert [message for message in said if "BatchNorm" not in message] == [
        "BatchSharpnessMonitor logs NaN: Boom: trapped"
    ]
    assert trap[0] <= 0
    for key in QUANTITIES:
        first, *rest = watched.curve(key)
        # The step's own batch is measured by itself, and so is ∇L; all that is drawn fails together.
        lost = {"step_sharpness": {"step_sharpness"}, "full gradient": {"gni", "lambda_gen"}}
        assert math.isnan(first) == (key in lost.get(name, set(QUANTITIES) - {"step_sharpness"})), key
        assert len(rest) == 2
        assert all(math.isfinite(value) for value in rest) or key == "lambda_gen"


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore:BatchNorm")
def test_raising_leaves_the_run_as_it_was(name: str) -> None:
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

    kept, module = Kept(), Trapped([CALLS[name]])
    follow = monitor(on_error="raise", every_n_train_steps=1, batches_at_once=1)
    with pytest.raises(Boom):
        watch(lambda: module, lambda: copies(classification(3)), follow, lambda: [kept])
    assert kept.state == kept.of(module)
    assert not {"training_step", "forward", "log"} & set(vars(module))
    # Nothing of the run is held on to.
    assert follow._calls == []
    assert follow._data is None
