"""A measurement by hand is that of a fit, costs what it costs, and leaves everything as it was."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers.counting import Passes, on_forward
from tests.helpers.modules import sgd
from tests.helpers.nested import everything
from tests.helpers.runs import Capture, Classifier, classification, make_trainer, mlp, rows
from tests.helpers.traps import Boom
from tests.helpers.witness import difference, frozen
from tests.testers.family import FamilyTester, Options, Trap, numbered


def data(shuffle: bool = False) -> DataLoader[Any]:
    """Single samples; shuffled by a generator of its own."""
    x, y = map(torch.cat, zip(*classification(4), strict=True))
    generator = torch.Generator().manual_seed(5) if shuffle else None
    return DataLoader(TensorDataset(x, y), batch_size=8, shuffle=shuffle, generator=generator)


def dropping() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.3), nn.Tanh(), nn.Linear(6, 3)).double()


def adam(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(module.parameters(), lr=0.01)


def scheduled(module: nn.Module) -> Any:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.2, momentum=0.5)
    return [optimizer], [torch.optim.lr_scheduler.LinearLR(optimizer, 0.5)]


class Manual(Classifier):
    """Steps by hand, and reads how many steps there were."""

    def __init__(self) -> None:
        super().__init__(mlp(4, 6, 3), scheduled)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer = self.optimizers()
        loss = self.loss(self(batch[0]), batch[1]) * (1.0 + self.global_step + self.current_epoch)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.lr_schedulers().step()
        self.log("train_loss", loss, on_epoch=True)
        return {"loss": loss}


MODULES: dict[str, Callable[[], pl.LightningModule]] = {
    "sgd": lambda: Classifier(mlp(4, 6, 3), sgd),
    "adam and dropout": lambda: Classifier(dropping(), adam),
    "scheduled": lambda: Classifier(mlp(4, 6, 3), scheduled),
    "manual": Manual,
}


def whole(module: pl.LightningModule, optimizer: Any, loader: DataLoader[Any], monitor: Any) -> Any:
    """All that an evaluation may not change."""
    state = optimizer.state_dict() if optimizer is not None else None
    objects = [] if optimizer is None else [id(optimizer.state), *map(id, optimizer.param_groups)]
    objects += [id(tensor) for one in getattr(optimizer, "state", {}).values() for tensor in one.values()]
    of_monitor = {name: value for name, value in vars(monitor).items() if name != "_measurement"}
    return everything(module) | {
        "optimizer": frozen([state, objects]),
        "loader": frozen([loader.generator, vars(loader.dataset)]),
        "monitor": frozen(of_monitor) | {"result": monitor.result},
    }


class EvaluationTester(FamilyTester):
    """Evaluations by hand beside fits."""

    def cases(self) -> dict[str, Mapping[str, Any]]:
        """Return modules, traps and the options whose evaluations are counted."""
        return {"name": {name: name for name in MODULES}, "trap": self.family.traps, "counted": self.counted}

    @property
    def counted(self) -> dict[str, Any]:
        return numbered(self.family.counted)

    def fitted(self, module: pl.LightningModule, monitor: Any, *callbacks: Any) -> dict[str, float]:
        """Return what a monitor logs before or at the first step of a fit."""
        capture = Capture()
        make_trainer(*callbacks, monitor, logger=capture, max_steps=1).fit(module, data(shuffle=True))
        return rows(capture)[0]

    @pytest.mark.check
    @pytest.mark.filterwarnings("ignore::lightning_curvature.CurvatureWarning")
    def test_values_are_those_of_a_fit(self, name: str) -> None:
        torch.manual_seed(3)
        module = MODULES[name]()
        follow = self.family.make_few()
        loader, before, random = data(shuffle=True), copy.deepcopy(module.state_dict()), torch.get_rng_state()
        found = follow.evaluate(module, loader, trainer=make_trainer())
        assert torch.equal(torch.get_rng_state(), random)
        assert difference(frozen(before), frozen(module.state_dict())) is None
        row = self.fitted(module, self.family.make_few())
        assert self.family.watched in found.values
        for key, value in found.values.items():
            assert value == row[key] or (math.isnan(value) and math.isnan(row[key])), key
        for key, error in found.errors.items():
            logged = row[f"{key}_stderr"] if f"{key}_stderr" in row else row[f"{key}_error"] * abs(row[key])
            assert error == logged or math.isnan(error), key
        assert found.values.keys() | {k for k in row if k.endswith(("_stderr", "_error"))} == row.keys()
        assert [f"{found}", found.drawn != {}] == [str(found), True]

    @pytest.mark.filterwarnings("ignore::lightning_curvature.CurvatureWarning")
    @pytest.mark.parametrize("fitted", [False, True])
    def test_everything_is_left_alone(self, name: str, fitted: bool) -> None:
        module, loader, follow = MODULES[name](), data(shuffle=True), self.family.make_few()
        trainer, optimizer = make_trainer(max_steps=2), None
        if fitted:
            trainer.fit(module, data())
            optimizer = trainer.optimizers[0]
        for p in module.parameters():
            p.grad = torch.ones_like(p)
        module.network.eval()
        before = whole(module, optimizer, loader, follow)
        found = follow.evaluate(module, loader, optimizer, trainer=make_trainer())
        assert difference(before, whole(module, optimizer, loader, follow)) is None
        again = follow.evaluate(module, loader, optimizer, trainer=make_trainer())
        assert str(again.rows()) == str(found.rows())
        if fitted and "two_over_lr" in found.values:
            assert found.values["two_over_lr"] == 2.0 / trainer.optimizers[0].param_groups[0]["lr"]

    @pytest.mark.filterwarnings("ignore:BatchNorm", "ignore:noise_", "ignore::lightning_curvature.CurvatureWarning")
    @pytest.mark.thinned(5)
    def test_an_error_leaves_everything_alone(self, trap: Trap) -> None:
        module, loader = trap.module(True), trap.data()
        follow = self.family.make(**(dict(trap.options) | {"on_error": "raise"}))
        before = everything(module)
        with trap.around(), pytest.raises(Boom):
            follow.evaluate(module, loader, trainer=make_trainer())
        assert difference(before, everything(module)) is None
        assert {"training_step", "forward", "log"}.isdisjoint(vars(module))

    @pytest.mark.thinned(5)
    def test_forwards_are_those_of_a_fit(self, counted: tuple[Options, list[int]]) -> None:
        options, _ = counted
        module = Classifier(mlp(4, 6, 3), lambda m: torch.optim.SGD(m.parameters(), lr=0.3))
        count = itertools.count()
        on_forward(module.network, lambda *_: next(count))
        self.family.make_few(**options).evaluate(module, data(), trainer=make_trainer())
        by_hand = next(count)
        passes = Passes(module.network)
        self.fitted(module, self.family.make_few(**options), passes)
        own = 0 if self.family.follows_steps else 1
        assert by_hand == passes.forwards[0] - own
