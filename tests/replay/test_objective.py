"""A recorded training step is a function of the parameters: at θ_t it gives the step's own numbers, bit for bit."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_curvature.directional.problem import Window
from lightning_curvature.directional.update_monitor import UpdateMonitor
from lightning_curvature.monitors.options import MonitorOptions
from lightning_curvature.replay.objective import Evaluation, StepObjective
from tests.helpers.runs import Batch, Classifier, classification, loader, make_trainer, mlp


class Replay(UpdateMonitor):
    """Repeats every step at θ_t, and keeps it beside what the step itself gave."""

    def __init__(self, objective: Any = None, outputs: str | None = None) -> None:
        super().__init__(MonitorOptions(objective=objective, outputs=outputs, on_error="raise"))
        self.base: list[list[Evaluation]] = []
        self.again: list[list[Evaluation]] = []
        self.elsewhere: list[float] = []

    def measure(self, trainer: pl.Trainer, window: Window | None, failure: Exception | None) -> None:
        assert window is not None
        window.take_base(repeat=False)
        self.base.append(window.base)
        # First somewhere else: what that leaves behind must not matter.
        self.elsewhere.append(window.loss_at(1.0).item())
        with window.at(0.0):
            self.again.append(list(window.evaluations()))


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.2)


def with_dropout() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3)).double()


def with_batchnorm() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()


class Noisy(Classifier):
    """Draws from every generator a step may draw from."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        x, y = batch
        x = x + torch.randn_like(x) * random.random() + float(np.random.rand())  # noqa: NPY002 - the global one
        return self.loss(self(x), y) * (1.0 + random.random())


class InPlace(Classifier):
    """Writes into its batch."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        batch[0].mul_(2.0).add_(1.0)
        return self.loss(self(batch[0]), batch[1])


class Stateful(Classifier):
    """Its loss depends on attributes that it changes."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.calls, self.history = 0, list[float]()
        self.register_buffer("running", torch.zeros(()).double())

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.calls += 1
        loss = self.loss(self(batch[0]), batch[1]) * (1 + self.calls) + self.running
        self.running += 0.1 * loss.detach()
        self.history.append(loss.item())
        return loss + sum(self.history)


class Annealed(Classifier):
    """Reads the Trainer's step count, which moves on before the measurement."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.loss(self(batch[0]), batch[1]) * (1 + self.global_step + self.trainer.global_step) + batch_idx


class Manual(Classifier):
    """Hands its loss to manual_backward."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(self(batch[0]), batch[1]))
        optimizer.step()


class Lbfgs(Classifier):
    """Calls the step several times a batch; only the first call is at θ_t."""

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


MODULES: dict[str, Callable[[], pl.LightningModule]] = {
    "plain": lambda: Classifier(mlp(4, 6, 3), sgd),
    "dropout": lambda: Classifier(with_dropout(), sgd),
    "batchnorm": lambda: Classifier(with_batchnorm(), sgd),
    "noise": lambda: Noisy(mlp(4, 6, 3), sgd),
    "writes into its batch": lambda: InPlace(mlp(4, 6, 3), sgd),
    "state": lambda: Stateful(mlp(4, 6, 3), sgd),
    "annealed": lambda: Annealed(mlp(4, 6, 3), sgd),
    "manual": lambda: Manual(with_dropout(), sgd),
    "lbfgs": lambda: Lbfgs(with_dropout(), sgd),
}


def fit(module: pl.LightningModule, replay: UpdateMonitor, batches: list[Any] | None = None, **options: Any) -> None:
    batches = classification(4) if batches is None else batches
    make_trainer(replay, **options).fit(module, loader(batches))


@pytest.mark.parametrize("name", MODULES)
def test_at_the_start_of_the_step_the_loss_is_the_step_s_own(name: str) -> None:
    replay = Replay()
    fit(MODULES[name](), replay)
    assert len(replay.base) == 4
    for (base,), (again,), elsewhere in zip(replay.base, replay.again, replay.elsewhere, strict=True):
        assert torch.equal(base.loss, again.loss)
        assert base.outputs is not None
        assert again.outputs is not None
        assert torch.equal(base.outputs, again.outputs)
        assert elsewhere != base.loss.item()  # the parameters do enter


def test_dropout_is_active_in_the_replay() -> None:
    """Else the test above would hold for a network in eval mode, too."""
    module, replay = MODULES["dropout"](), Replay()
    fit(module, replay)
    assert module.training
    outputs = replay.again[0][0].outputs
    assert outputs is not None
    with torch.no_grad():
        without = with_dropout().eval()(classification(4)[0][0])
    assert not torch.allclose(outputs, without)


def test_every_batch_of_an_accumulation_window_is_repeated() -> None:
    batches = classification(5)
    batches[-1] = (batches[-1][0][:3], batches[-1][1][:3])  # ragged
    replay = Replay()
    fit(Classifier(with_dropout(), sgd), replay, batches, accumulate_grad_batches=3)
    assert [len(window) for window in replay.base] == [3, 2]
    for base, again in zip(replay.base, replay.again, strict=True):
        assert all(torch.equal(b.loss, a.loss) for b, a in zip(base, again, strict=True))


def test_mixed_precision_is_repeated() -> None:
    replay = Replay()
    module = Classifier(with_dropout().float(), sgd)
    fit(module, replay, classification(3, dtype=torch.float32), precision="bf16-mixed")
    for (base,), (again,) in zip(replay.base, replay.again, strict=True):
        assert base.outputs is not None
        assert base.outputs.dtype == torch.bfloat16
        assert torch.equal(base.loss, again.loss)


class Shaped(Classifier):
    """Its outputs come in one of many ways."""

    def __init__(self, way: str) -> None:
        super().__init__(nn.ModuleDict({"body": mlp(4, 6), "head": mlp(6, 3)}), sgd)
        self.way = way

    def forward(self, x: Tensor) -> Any:
        z = self.network["head"](self.network["body"](x))  # type: ignore[index]
        return {"dict": {"logits": z}, "object": SimpleNamespace(logits=z)}.get(self.way, z)

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        x, y = batch
        if self.way in ("submodule", "returned", "nothing"):  # past forward
            z = self.network["head"](self.network["body"](x))  # type: ignore[index]
        else:
            found = self(x)
            z = found["logits"] if self.way == "dict" else found.logits if self.way == "object" else found
        if self.way == "twice":
            z = 0.5 * (z + self(x))
        loss = F.cross_entropy(z, y)
        return {"loss": loss, "outputs": z} if self.way == "returned" else loss


@pytest.mark.parametrize("way", ["forward", "dict", "object", "returned", "submodule"])
def test_outputs_are_found(way: str) -> None:
    batches = classification(2)
    replay = Replay(outputs="network.head" if way == "submodule" else None)
    module = Shaped(way)
    with torch.no_grad():
        expected = module.network["head"](module.network["body"](batches[0][0]))  # type: ignore[index]
    fit(module, replay, batches)
    for found in (replay.base[0][0], replay.again[0][0]):
        assert found.outputs is not None
        assert not found.outputs.requires_grad
        assert torch.equal(found.outputs, expected)


@pytest.mark.parametrize("way", ["nothing", "twice"])
def test_outputs_that_are_not_there_or_ambiguous_are_none(way: str) -> None:
    replay = Replay()
    fit(Shaped(way), replay)
    assert replay.base[0][0].outputs is None
    assert torch.equal(replay.base[0][0].loss, replay.again[0][0].loss)


class OwnObjective(Replay):
    """With objective= the base is a forward of the objective, at θ_t."""

    def measure(self, trainer: pl.Trainer, window: Window | None, failure: Exception | None) -> None:
        assert window is not None
        window.take_base(repeat=True)
        self.base.append(window.base)


@pytest.mark.parametrize("kind", ["loss", "dict"])
def test_objective_in_place_of_the_step(kind: str) -> None:
    mask = torch.arange(8) % 2

    def objective(module: Any, batch: Batch) -> Any:
        z = module.network(batch[0])
        loss = F.cross_entropy(z, batch[1]) * 2.0
        return {"loss": loss, "outputs": z, "mask": mask} if kind == "dict" else loss

    batches, module = classification(2), Classifier(mlp(4, 6, 3), sgd)
    with torch.no_grad():
        outputs = module.network(batches[0][0])
        loss = objective(module, batches[0])
    replay = OwnObjective(objective)
    fit(module, replay, batches)
    found = replay.base[0][0]
    assert torch.equal(found.loss, loss["loss"] if kind == "dict" else loss)
    if kind == "dict":
        assert found.outputs is not None
        assert torch.equal(found.outputs, outputs)
        assert found.mask is mask
    else:
        assert (found.outputs, found.mask) == (None, None)


def test_a_submodule_that_does_not_exist_is_explained() -> None:
    with pytest.raises(
        ValueError, match=r"outputs must name a submodule of Classifier, got 'heads': choose one of \['network', 'net"
    ):
        StepObjective(Classifier(mlp(4, 6, 3), sgd), torch.device("cpu"), outputs="heads")
