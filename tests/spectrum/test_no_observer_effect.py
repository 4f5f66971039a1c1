"""A run with HessianSpectrumMonitor is the run without it, bit for bit: module, optimizer, data and random numbers."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_curvature import CurvatureWarning, HessianSpectrumMonitor
from tests.directional.test_no_observer_effect import SETUPS, Measured, with_batchnorm, with_dropout
from tests.directional.test_no_observer_effect_habits import HABITS, Habitual
from tests.runs import Classifier, classification
from tests.witness import Record, assert_same, copies, frozen, watch

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


class Augmented(Dataset[Any]):
    """Draws from every generator there is, and from two of its own; counts what was read in its own order."""

    def __init__(self) -> None:
        self.x, self.y = (torch.cat(parts) for parts in zip(*classification(4), strict=True))
        self.generator, self.numpy = torch.Generator().manual_seed(3), np.random.default_rng(3)

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = random.random() + float(np.random.rand()) + float(self.numpy.random())  # noqa: NPY002
        noise += float(torch.rand(())) + float(torch.rand((), generator=self.generator))
        return self.x[index] + 0.1 * noise, self.y[index]


class Stream(IterableDataset[Any]):
    """Draws as it goes."""

    def __iter__(self) -> Iterator[Any]:
        for x, y in zip(*(torch.cat(parts) for parts in zip(*classification(4), strict=True)), strict=True):
            yield x + torch.rand(()), y


def augmented(**options: Any) -> DataLoader[Any]:
    return DataLoader(Augmented(), batch_size=8, **options)


def with_generator() -> DataLoader[Any]:
    return augmented(shuffle=True, generator=torch.Generator().manual_seed(7))


DATA: dict[str, Callable[[], DataLoader[Any]]] = {
    "augmented": augmented,
    "shuffled": lambda: augmented(shuffle=True),
    "shuffled by its own generator": with_generator,
    "stream": lambda: DataLoader(Stream(), batch_size=8),
}


class Hooked(Classifier):
    """Augments on the device, counts what it has seen, and changes the batch in place."""

    def __init__(self) -> None:
        super().__init__(with_dropout(), lambda m: torch.optim.Adam(m.parameters(), lr=0.01))
        self.seen, self.transfers = 0, 0

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.transfers += 1
        batch[0].mul_(1.0 + random.random())
        return batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.seen += len(batch[1])
        batch[0].add_(0.1 * torch.randn_like(batch[0]))
        return batch


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


class Boom(RuntimeError):
    pass


class Trapped(Classifier):
    """Fails in the middle of a measurement: in another mode, flags changed, counters ahead, numbers drawn."""

    def __init__(self, trap: list[int]) -> None:
        super().__init__(with_batchnorm(), lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9))
        # Outside the module's state, which is put back: calls until it fails; the run's own calls do not count.
        self.trap = lambda: trap
        self.count, self.seen = 0, list[float]()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        # A repeated step sees a stand-in for the Trainer.
        measuring, trap = not isinstance(self._trainer, pl.Trainer), self.trap()
        self.count += 1
        self.network[1].eval()
        self.network[0].bias.requires_grad_(False)
        self.optimizers().param_groups[0]["lr"] *= 0.9
        logits = self(batch[0])
        self.seen.append(float(logits.sum() + torch.rand(())))
        if measuring:
            trap[0] -= 1
            if trap[0] == 0:
                raise Boom("trapped")
        self.network[1].train()
        self.network[0].bias.requires_grad_(True)
        loss = F.cross_entropy(logits, batch[1])
        self.log("train_loss", loss)
        return loss


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


class Unreadable(Augmented):
    """Can be read by training, which reads in order, and by nobody else, after some draws."""

    allowed: Callable[[], bool] = staticmethod(lambda: True)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        sample = super().__getitem__(index)
        if index == 5 and not self.allowed():
            raise Boom("unreadable")
        return sample


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
