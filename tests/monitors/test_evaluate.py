"""Evaluations by hand: values of the oracle, optimizers, mistakes, and the shape of the result."""

from __future__ import annotations

import math
import sys
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.func import functional_call, grad, hessian
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader, TensorDataset

from lightning_curvature import (
    BatchSharpnessMonitor,
    DirectionalCurvatureMonitor,
    Evaluation,
    HessianSpectrumMonitor,
    NoiseCovarianceMonitor,
    RegimeMonitor,
    StabilityMonitor,
)
from tests.helpers.modules import sgd
from tests.helpers.nested import everything
from tests.helpers.runs import Classifier, classification, make_trainer, mlp
from tests.helpers.witness import difference, frozen, random_states

# Eigenvalues and sums of a few hundred terms in float64, in another order.
ROUNDING = 1e-9


def data(count: int = 3) -> DataLoader[Any]:
    x, y = map(torch.cat, zip(*classification(count), strict=True))
    return DataLoader(TensorDataset(x, y), batch_size=8)


def module(make: Any = sgd) -> Classifier:
    return Classifier(mlp(4, 5, 3), make)


def dense(one: Classifier, batches: Any) -> tuple[Any, Any]:
    """Gradient and Hessian of the mean loss over all samples, from torch.func."""
    x, y = map(torch.cat, zip(*batches, strict=True))
    names, parameters = zip(*one.network.named_parameters(), strict=True)
    sizes = [p.numel() for p in parameters]

    def loss(flat: Any) -> Any:
        parts = [f.view_as(p) for f, p in zip(flat.split(sizes), parameters, strict=True)]
        return one.loss(functional_call(one.network, dict(zip(names, parts, strict=True)), (x,)), y)

    flat = parameters_to_vector(parameters).detach()
    return grad(loss)(flat), hessian(loss)(flat)


def test_spectrum_is_that_of_the_dense_hessian() -> None:
    one = module(lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.5))
    _, h = dense(one, data())
    monitor = HessianSpectrumMonitor(quantities=("lambda_max", "hessian_trace"), tolerance=1e-8, trace_error=1e-3)
    found = monitor.evaluate(one, data(), trainer=make_trainer())
    assert found.values["lambda_max"] == pytest.approx(float(torch.linalg.eigvalsh(h)[-1]), rel=1e-8)
    assert abs(found.values["hessian_trace"] - float(h.trace())) <= 3.0 * found.errors["hessian_trace"] + ROUNDING
    assert found.errors["lambda_max"] <= 1e-8 * found.values["lambda_max"]
    assert found.edges == {"lambda_max": pytest.approx(30.0)}
    assert found.values["lambda_max_threshold"] == found.edges["lambda_max"]
    assert found.result.values()["lambda_max"] == found.values["lambda_max"]


def test_curvature_along_the_step_of_an_optimizer_that_was_given() -> None:
    """Its own momentum, from a step before, and the data of the first batch alone."""
    one = module()
    optimizer = torch.optim.SGD(one.parameters(), lr=0.2, momentum=0.9)
    g, _ = dense(one, classification(1))
    for p, part in zip(one.parameters(), g.split([p.numel() for p in one.parameters()]), strict=True):
        p.grad = 2.0 * part.view_as(p)
    optimizer.step()
    state = frozen(optimizer.state_dict())
    g, h = dense(one, classification(1))
    buffers = parameters_to_vector([optimizer.state[p]["momentum_buffer"] for p in one.parameters()])
    step = g + 0.9 * buffers
    monitor = DirectionalCurvatureMonitor(estimators=("hvp",))
    found = monitor.evaluate(one, data(), optimizer, trainer=make_trainer())
    assert found.values["lambda_dir"] == pytest.approx(float(step @ h @ step / (g @ step)), rel=ROUNDING)
    assert found.values["update_norm"] == pytest.approx(float(step.norm()), rel=ROUNDING)
    assert found.edges == {"lambda_dir": pytest.approx(10.0)}
    assert frozen(optimizer.state_dict()) == state


def test_the_step_is_clipped_as_the_trainer_clips() -> None:
    monitor = DirectionalCurvatureMonitor(estimators=("hvp",))
    free, clipped = (
        monitor.evaluate(module(), data(), trainer=make_trainer(gradient_clip_val=value)) for value in (None, 1e-3)
    )
    lr = 2.0 / free.values["two_over_lr"]
    assert clipped.values["update_norm"] == pytest.approx(1e-3, rel=1e-2)
    assert free.values["update_norm"] > 0.01 > lr * clipped.values["update_norm"]


class Needy(Classifier):
    """Its optimizer needs a Trainer."""

    def __init__(self) -> None:
        super().__init__(mlp(4, 5, 3), sgd)
        self.calls = 0

    def configure_optimizers(self) -> Any:
        self.calls += 1
        torch.rand(())
        return torch.optim.SGD(self.parameters(), lr=1.0 / self.trainer.estimated_stepping_batches)


def test_without_an_optimizer(caplog: pytest.LogCaptureFixture, informed: Any) -> None:
    """No edges; the values are the same, and what needs one says so."""
    one, before = Needy(), random_states()
    found = HessianSpectrumMonitor().evaluate(one, data(), trainer=make_trainer())
    assert one.calls == 0
    assert random_states() == before
    assert found.edges == {}
    assert {"lambda_max_threshold", "stability_headroom"}.isdisjoint(found.values)
    assert sum("no edges of stability: configure_optimizers failed: RuntimeError" in text for text in caplog.messages)
    known = HessianSpectrumMonitor().evaluate(one, data(), sgd(one), trainer=make_trainer())
    assert known.values["lambda_max"] == found.values["lambda_max"]
    assert known.edges
    for monitor, name in (
        (HessianSpectrumMonitor(quantities=("second_moment_contraction",)), "second_moment_contraction"),
        (BatchSharpnessMonitor(quantities=("lambda_gen",)), "lambda_gen"),
    ):
        said = rf"^optimizer must be given for \['{name}'\], got none, and configure_optimizers failed: .*: give"
        with pytest.raises(MisconfigurationException, match=said):
            monitor.evaluate(one, data(), trainer=make_trainer())
    said = "^optimizer must be given for DirectionalCurvatureMonitor, which measures along its step, got none, and conf"
    with pytest.raises(MisconfigurationException, match=said):
        DirectionalCurvatureMonitor().evaluate(one, data(), trainer=make_trainer())
    trainer = make_trainer(max_steps=1)
    trainer.fit(one, data())
    assert HessianSpectrumMonitor().evaluate(one, data(), trainer=make_trainer()).edges  # it has a Trainer now


MISTAKES: dict[str, tuple[Any, tuple[Any, ...], str]] = {
    "stability": (StabilityMonitor(), (), "^StabilityMonitor needs the steps of a fit, .*: give it to a Trainer as a"),
    "regime": (RegimeMonitor(), (), "^RegimeMonitor needs the losses of a fit, .*: give it to a Trainer as a callback"),
    "oscillation": (
        DirectionalCurvatureMonitor(estimators=("kl", "oscillation")),
        (),
        "^estimators must not hold 'oscillation' for evaluate.*: leave it out",
    ),
    "no data": (HessianSpectrumMonitor(), (None,), "^dataloader must be given where there is no Trainer's, got None"),
    "no batch": (DirectionalCurvatureMonitor(), ([],), "^dataloader must give at least one batch, got none"),
    "a class": (HessianSpectrumMonitor(), (data(), "sgd"), "^optimizer must be an optimizer of the module, got a str"),
    "another's": (
        HessianSpectrumMonitor(),
        (data(), torch.optim.SGD([torch.zeros(1)], lr=0.1)),
        "^optimizer must move parameters of the module, got a SGD of other tensors",
    ),
    "index": (
        HessianSpectrumMonitor(optimizer_index=1),
        (),
        "^optimizer_index must be below the number of optimizers, got 1 of 1",
    ),
    "parameter": (NoiseCovarianceMonitor(parameter="nowhere"), (), "^parameter must "),
    "adaptive": (
        HessianSpectrumMonitor(quantities=("preconditioned_lambda_max",)),
        (data(), torch.optim.Rprop(nn.Linear(1, 1).parameters())),
        "^optimizer must move parameters of the module",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str) -> None:
    monitor, arguments, said = MISTAKES[name]
    one = module()
    before = everything(one)
    with pytest.raises((MisconfigurationException, ValueError), match=said):
        monitor.evaluate(one, *(arguments or (data(),)), trainer=make_trainer())
    assert difference(before, everything(one)) is None


class Lost(Classifier):
    """Gives no loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None


def test_a_step_without_a_loss() -> None:
    with pytest.raises(MisconfigurationException, match=r"^training_step must return a loss on the first batch"):
        DirectionalCurvatureMonitor().evaluate(Lost(mlp(4, 5, 3), sgd), data(), trainer=make_trainer())


def test_a_value_that_is_nan_has_a_reason() -> None:
    """Adam has no preconditioner before its first step."""
    adam = module(lambda m: torch.optim.Adam(m.parameters()))
    monitor = HessianSpectrumMonitor(quantities=("lambda_max", "preconditioned_lambda_max"))
    found = monitor.evaluate(adam, data(), trainer=make_trainer())
    assert math.isnan(found.values["preconditioned_lambda_max"])
    assert found.reasons["preconditioned_lambda_max"]
    assert found.reasons["preconditioned_lambda_max"] in str(found)
    assert math.isfinite(found.values["lambda_max"])


def test_its_own_trainer_is_quiet(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    """Float32, as the module is."""
    one = Classifier(mlp(4, 5, 3, dtype=torch.float32), sgd)
    x, y = map(torch.cat, zip(*classification(2, dtype=torch.float32), strict=True))
    loader = DataLoader(TensorDataset(x, y), batch_size=8)
    for monitor in (HessianSpectrumMonitor(), DirectionalCurvatureMonitor()):
        assert all(map(math.isfinite, monitor.evaluate(one, loader).values.values()))
    assert capsys.readouterr().out == ""
    assert caplog.messages == []


def test_the_table_and_the_frame() -> None:
    found = Evaluation({"ias": 2.0, "ias_batches": 8.0, "gni": math.nan}, {"ias": 0.5}, {"ias": 20.0}, {"gni": "no ∇L"})
    assert str(found).splitlines() == [
        "key          value  error  edge  reason",
        "ias              2    0.5    20",
        "gni            nan               no ∇L",
        "ias_batches      8",
    ]
    frame = pytest.importorskip("pandas") and found.to_pandas()
    assert list(frame.columns) == ["value", "error", "edge", "reason"]
    assert frame.loc["ias", "error"] == 0.5
    assert frame.loc["gni", "reason"] == "no ∇L"
    assert math.isnan(frame.loc["gni", "edge"])


def test_pictures() -> None:
    plain = Evaluation({"ias": 2.0, "ias_batches": 8.0, "gni": math.nan, "two_over_lr": 20.0}, {"ias": 0.5}).plot()
    assert [text.get_text() for text in plain.axes[0].get_yticklabels()] == ["ias"]
    density = HessianSpectrumMonitor(quantities=("spectral_density",))
    found = density.evaluate(module(), data(), trainer=make_trainer())
    assert found.plot().axes[0].get_ylabel() == "density"


@pytest.mark.parametrize(("package", "method"), [("pandas", "to_pandas"), ("matplotlib", "plot")])
def test_packages_that_are_not_there(package: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    said = rf"^{method}\(\) needs {package}, which is not installed: run `pip install {package}`"
    with pytest.raises(ModuleNotFoundError, match=said):
        getattr(Evaluation({"ias": 1.0}), method)()


def test_joined_evaluations() -> None:
    first, second = Evaluation({"two_over_lr": 20.0, "ias": 1.0}, result=1), Evaluation({"two_over_lr": 20.0}, result=2)
    assert Evaluation.joined([first]) is first
    both = Evaluation.joined([first, second])
    assert (both.values, both.result) == ({"two_over_lr": 20.0, "ias": 1.0}, (1, 2))
    with pytest.raises(ValueError, match=r"^monitors must give different values, got 'ias' of two of them, 1 and 2"):
        Evaluation.joined([first, Evaluation({"ias": 2.0})])


class Inside(pl.Callback):
    """Evaluates in the middle of a fit, by a monitor that watches the fit."""

    def __init__(self, monitor: Any) -> None:
        self.monitor, self.found = monitor, list[Evaluation]()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.found.append(self.monitor.evaluate(pl_module, data(), trainer.optimizers[0], trainer=trainer))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [HessianSpectrumMonitor, BatchSharpnessMonitor, DirectionalCurvatureMonitor])
def test_in_the_middle_of_a_fit(kind: Any) -> None:
    def run(*callbacks: Any, monitor: Any) -> Any:
        trainer, one = make_trainer(*callbacks, monitor, max_epochs=2), module()
        trainer.fit(one, data())
        return frozen([one.state_dict(), trainer.optimizers[0].state_dict(), dict(trainer.callback_metrics)])

    monitor = kind(every_n_train_steps=2)
    inside = Inside(monitor)
    assert difference(run(monitor=kind(every_n_train_steps=2)), run(inside, monitor=monitor)) is None
    assert len(inside.found) == 6
    key = next(iter(inside.found[0].values))
    assert len({one.values[key] for one in inside.found}) == 6
