"""A run with HessianSpectrumMonitor is the run without it, bit for bit: module, optimizer, data and random numbers."""

from __future__ import annotations

import math
import warnings
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_curvature import CurvatureWarning, HessianSpectrumMonitor
from tests.helpers.habits import HABITS, Habitual
from tests.helpers.runs import classification
from tests.helpers.setups import SETUPS, Measured
from tests.helpers.traps import DATA, Boom, Hooked, Trapped, Unreadable
from tests.helpers.witness import Record, assert_same, copies, frozen, watch

QUANTITIES = (
    "lambda_max",
    "lambda_min",
    "hessian_trace",
    "spectral_density",
    "gauss_newton_lambda_max",
    "preconditioned_lambda_max",
    "second_moment_contraction",
)
# Without a known preconditioner.
UNKNOWN = ("noisy optimizer", "lbfgs")


def monitor(*without: str, **options: Any) -> HessianSpectrumMonitor:
    """All quantities, as few products as may be: what one of them leaves behind, the next would too."""
    quick: dict[str, Any] = {"max_products": 20, "density_starts": 1, "density_steps": 3, "tolerance": 0.1}
    quantities: Any = [name for name in QUANTITIES if name not in without]
    return HessianSpectrumMonitor(**({"quantities": quantities, "every_n_train_steps": 2} | quick | options))


def assert_measured(watched: Record, *without: str) -> None:
    """The monitor did measure: what never ran cannot have disturbed anything."""
    for key in QUANTITIES:
        if key != "spectral_density" and key not in without:
            values = watched.curve(key)
            assert values, key
            assert any(math.isfinite(value) for value in values), key


@pytest.mark.parametrize("name", SETUPS)
@pytest.mark.filterwarnings("ignore::lightning_curvature.CurvatureWarning")
def test_same_run(name: str) -> None:
    without = ("preconditioned_lambda_max",) if name in UNKNOWN else ()
    # Manual optimization makes two steps of four batches.
    watched = SETUPS[name].run(monitor(*without, every_n_train_steps=1 if name == "manual optimization" else 2))  # type: ignore[arg-type]
    assert_same(SETUPS[name].run(None), watched)
    # Under accumulation in three batches, and with SGD's first step, there is always a P; Adam's comes later.
    assert_measured(watched, *without)


@pytest.mark.parametrize("name", HABITS)
def test_steps_with_habits(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    def run(follow: HessianSpectrumMonitor | None) -> tuple[Record, str]:
        data = lambda: copies(classification(4))  # noqa: E731
        record = watch(lambda: Habitual(HABITS[name]), data, follow, max_epochs=2)
        return record, capsys.readouterr().out

    plain, printed = run(None)
    watched, printed_too = run(monitor())
    assert_same(plain, watched)
    assert printed == printed_too
    assert_measured(watched)


@pytest.mark.parametrize(("make", "samples"), [(Hooked, 11), (Measured, 2048)])
@pytest.mark.parametrize("name", DATA)
@pytest.mark.filterwarnings("ignore::lightning_curvature.CurvatureWarning")
def test_data_is_read_as_if_nobody_else_did(name: str, make: Any, samples: int) -> None:
    def run(follow: HessianSpectrumMonitor | None) -> tuple[Record, Any]:
        loaders: list[Any] = []

        def data() -> DataLoader[Any]:
            loaders.append(DATA[name]())
            return loaders[-1]

        record = watch(make, data, follow, max_epochs=2)
        (loader,) = loaders
        return record, frozen([loader.generator, vars(loader.dataset)])

    (plain, generators), (watched, generators_too) = run(None), run(monitor(probe_samples=samples))
    assert_same(plain, watched)
    assert generators == generators_too
    assert_measured(watched)


@pytest.mark.parametrize("keep_graph", [True, False])
@pytest.mark.parametrize("call", [1, 2, 4, 5])
@pytest.mark.filterwarnings("ignore:BatchNorm")
def test_failing_step(call: int, keep_graph: bool) -> None:
    """In the first or second of three micro-batches, in the first product or, without kept graphs, in the second."""
    run = lambda follow, trap: watch(lambda: Trapped(trap), lambda: copies(classification(3)), follow)  # noqa: E731
    trap = [call]
    # λ_max and the density fail together, since they share products; the others have operators of their own.
    names: Any = ("lambda_max", "hessian_trace", "spectral_density", "gauss_newton_lambda_max")
    follow = monitor(quantities=names, products="exact", keep_graph=keep_graph, every_n_train_steps=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        watched = run(follow, trap)
    assert_same(run(None, [0]), watched)
    said = [str(w.message) for w in caught if issubclass(w.category, CurvatureWarning)]
    assert [message for message in said if "BatchNorm" not in message] == [
        "HessianSpectrumMonitor logs NaN: Boom: trapped"
    ]
    assert trap[0] <= 0
    # With kept graphs calls 4 and 5 come from the next operator, G; without, from the second product with H.
    failed = "gauss_newton_lambda_max" if keep_graph and call > 3 else "lambda_max"
    for key in ("lambda_max", "gauss_newton_lambda_max"):
        first, *rest = watched.curve(key)
        assert math.isnan(first) == (key == failed), key
        assert len(rest) == 2
        assert all(math.isfinite(value) for value in rest)


def test_failing_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_curvature.monitors import probe_set as probe_set_monitor

    reading: list[int] = []
    read = probe_set_monitor.read_probe_set

    def noted(*args: Any, **kwargs: Any) -> Any:
        reading.append(1)
        try:
            return read(*args, **kwargs)
        finally:
            reading.pop()

    monkeypatch.setattr(probe_set_monitor, "read_probe_set", noted)
    monkeypatch.setattr(Unreadable, "allowed", staticmethod(lambda: not reading))

    def run(follow: HessianSpectrumMonitor | None) -> tuple[Record, Any]:
        loader = DataLoader(Unreadable(), batch_size=8, shuffle=True)
        record = watch(Hooked, lambda: loader, follow)
        return record, frozen([loader.dataset.generator, loader.dataset.numpy])

    plain, generators = run(None)
    with pytest.warns(CurvatureWarning, match="HessianSpectrumMonitor logs NaN: Boom: unreadable"):
        watched, generators_too = run(monitor())
    assert_same(plain, watched)
    assert generators == generators_too


@pytest.mark.parametrize("products", ["exact", "difference"])
@pytest.mark.filterwarnings("ignore:BatchNorm")
def test_raising_leaves_the_parameters_as_they_were(products: Any) -> None:
    """With on_error="raise" the error ends the run at the very θ_t, modes, flags and counters that the step found."""

    class Kept(pl.Callback):
        state: dict[str, Any]

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            self.state = self.of(pl_module)

        def of(self, module: Any) -> dict[str, Any]:
            flags = [(p.requires_grad, p.grad) for p in module.parameters()]
            modes = [m.training for m in module.modules()]
            rate = module.optimizers().param_groups[0]["lr"]
            return frozen([module.state_dict(), flags, modes, module.count, module.seen, rate, torch.get_rng_state()])

    kept, module = Kept(), Trapped([8])
    follow = monitor(quantities=("lambda_max",), products=products, on_error="raise", every_n_train_steps=1)
    with pytest.raises(Boom):
        watch(lambda: module, lambda: copies(classification(3)), follow, lambda: [kept])
    assert kept.state == kept.of(module)
    assert not {"training_step", "forward", "log"} & set(vars(module))
