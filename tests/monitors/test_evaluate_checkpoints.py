"""Checkpoints of a run, evaluated afterwards: what the run has logged, in the order of its steps."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_curvature import (
    BatchSharpnessMonitor,
    DirectionalCurvatureMonitor,
    HessianSpectrumMonitor,
    StabilityMonitor,
    Trajectory,
    evaluate_checkpoints,
)
from tests.helpers.nested import everything
from tests.helpers.runs import Capture, Classifier, classification, make_trainer, mlp, rows
from tests.helpers.traps import Boom
from tests.helpers.witness import difference, frozen

STEPS = (3, 6, 9)


def data() -> DataLoader[Any]:
    x, y = map(torch.cat, zip(*classification(3), strict=True))
    return DataLoader(TensorDataset(x, y), batch_size=8)


class Learner(Classifier):
    """Its learning rate falls, and its loss grows with the steps."""

    def __init__(self, width: int = 5) -> None:
        super().__init__(mlp(4, width, 3), lambda m: None)
        self.fails = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.fails and self.global_step:
            raise Boom("trapped")
        return super().training_step(batch, batch_idx) * (1.0 + 0.1 * self.global_step + self.current_epoch)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.02)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def spectrum(**options: Any) -> HessianSpectrumMonitor:
    """Searches anew each time, as an evaluation does."""
    quantities = ("lambda_max", "preconditioned_lambda_max")
    return HessianSpectrumMonitor(quantities=quantities, every_n_train_steps=3, recheck_every=1, **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, dict[str, float]]]:
    """Ten steps, checkpoints before steps 3, 6 and 9, and what two monitors have logged there."""
    folder, capture = tmp_path_factory.mktemp("run"), Capture()
    saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=3, save_top_k=-1)
    monitors = spectrum(), BatchSharpnessMonitor(every_n_train_steps=3)
    trainer = make_trainer(saver, *monitors, logger=capture, max_epochs=4, max_steps=10, enable_checkpointing=True)
    trainer.fit(Learner(), data())
    return folder, rows(capture)


@pytest.mark.slow
def test_values_are_those_of_the_run(run: Any) -> None:
    folder, logged = run
    module = Learner()
    before = everything(module)
    found = evaluate_checkpoints(folder, [spectrum(), BatchSharpnessMonitor()], module, data(), trainer=make_trainer())
    assert difference(before, everything(module)) is None
    assert found.steps == STEPS
    assert [Path(path).name for path in found.checkpoints] == [f"step={step}.ckpt" for step in STEPS]
    for step, one in zip(found.steps, found.evaluations, strict=True):
        for key, value in one.values.items():
            assert value == logged[step][key], (step, key)
    lr = [0.02 * 0.9**step for step in STEPS]
    assert found.curve("two_over_lr") == pytest.approx([2.0 / one for one in lr])
    assert found.evaluations[0].edges["preconditioned_lambda_max"] > 1.0 / lr[0]


def test_the_step_is_that_of_the_state(run: Any) -> None:
    """Adam's second step would be another one without its moments; the optimizer that was given comes back."""
    folder, _ = run
    module, monitor = Learner(), DirectionalCurvatureMonitor(estimators=("hvp",))
    optimizer = torch.optim.Adam(module.parameters(), lr=0.5)
    groups, state = optimizer.param_groups, optimizer.state
    before = frozen(optimizer.state_dict())
    found = evaluate_checkpoints(str(folder / "*6.ckpt"), monitor, module, data(), optimizer, trainer=make_trainer())
    assert frozen(optimizer.state_dict()) == before
    assert optimizer.param_groups is groups
    assert optimizer.state is state
    # The same by hand.
    checkpoint = torch.load(folder / "step=6.ckpt", weights_only=True)
    module.load_state_dict(checkpoint["state_dict"])
    optimizer.load_state_dict(checkpoint["optimizer_states"][0])
    x, y = next(iter(data()))
    loss = module.loss(module(x), y) * (1.0 + 0.6 + 2.0)  # step 6 begins epoch 2
    loss.backward()
    start = torch.cat([p.detach().flatten().clone() for p in module.parameters()])
    optimizer.step()
    norm = float((torch.cat([p.detach().flatten() for p in module.parameters()]) - start).norm())
    lr = optimizer.param_groups[0]["lr"]
    assert found.curve("update_norm") == pytest.approx([norm / lr])
    assert found.steps == (6,)


def test_an_error_leaves_everything_alone(run: Any) -> None:
    module = Learner()
    module.fails = True
    optimizer = torch.optim.Adam(module.parameters())
    before = everything(module), frozen(optimizer.state_dict())
    with pytest.raises(Boom):
        evaluate_checkpoints(run[0], spectrum(on_error="raise"), module, data(), optimizer, trainer=make_trainer())
    assert difference(before[0], everything(module)) is None
    assert frozen(optimizer.state_dict()) == before[1]


def test_tables_and_pictures(run: Any, tmp_path: Path) -> None:
    folder, _ = run
    found = evaluate_checkpoints([folder / "step=9.ckpt", folder / "step=3.ckpt"], spectrum(), Learner(), data())
    assert found.steps == (3, 9)
    found.to_csv(tmp_path / "found.csv")
    with open(tmp_path / "found.csv", newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == ["step", "key", "value", "error", "edge", "reason", "checkpoint"]
    one = next(row for row in table if row["key"] == "lambda_max" and row["step"] == "9")
    assert float(one["value"]) == found.curve("lambda_max")[1]
    assert one["edge"] == ""  # Adam has none on λ_max(H)
    assert one["checkpoint"].endswith("step=9.ckpt")
    pytest.importorskip("pandas")
    frame = found.to_pandas()
    assert list(frame["value"].unstack()["lambda_max"]) == found.curve("lambda_max")
    figure = found.plot()
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["lambda_max", "preconditioned_lambda_max", "stability_headroom"]
    assert [len(axes.lines) for axes in figure.axes] == [1, 2, 1]
    assert str(found).splitlines()[0].split() == ["step", *titles]
    assert str(found).splitlines()[2].split()[0] == "9"
    assert math.isnan(Trajectory((0,), ("a",), found.evaluations[:1]).curve("nowhere")[0])


def without(checkpoint: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in checkpoint.items() if key != name}


MISTAKES: dict[str, tuple[Any, str]] = {
    "other module": (lambda c: c | {"state_dict": Learner(6).state_dict()}, "must hold the parameters of the module"),
    "no checkpoint": (lambda c: c["state_dict"], "must be a checkpoint of Lightning with 'state_dict' and 'global_st"),
    "no step": (lambda c: without(c, "global_step"), "must be a checkpoint of Lightning with 'state_dict' and 'glob"),
    "other objects": (lambda c: c | {"more": STEPS_OF}, "must hold tensors and plain containers alone under weights_o"),
    "other optimizer": (
        lambda c: c | {"optimizer_states": [torch.optim.SGD([torch.zeros(1)]).state_dict()]},
        "must hold the state of the optimizer, got one that does not fit Adam",
    ),
}


def steps_of() -> None:
    """A function, which a file may name."""


STEPS_OF = steps_of


@pytest.mark.parametrize("name", MISTAKES)
def test_files_that_do_not_fit(name: str, run: Any, tmp_path: Path) -> None:
    change, said = MISTAKES[name]
    torch.save(change(torch.load(run[0] / "step=3.ckpt", weights_only=True)), tmp_path / "one.ckpt")
    module = Learner()
    before = everything(module)
    with pytest.raises(MisconfigurationException, match=rf"^'.*one\.ckpt' {said}.*: .*\.$"):
        evaluate_checkpoints(tmp_path / "one.ckpt", spectrum(), module, data(), trainer=make_trainer())
    assert difference(before, everything(module)) is None


def test_what_cannot_be_evaluated(run: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^checkpoints must be files, or patterns that match some, got '.*\*\.ckpt'"):
        evaluate_checkpoints(tmp_path, spectrum(), Learner(), data())
    with pytest.raises(MisconfigurationException, match=r"^StabilityMonitor needs the steps of a fit"):
        evaluate_checkpoints(run[0], StabilityMonitor(), Learner(), data())
    (tmp_path / "one.ckpt").write_text("no")
    with pytest.raises(MisconfigurationException, match=r"^'.*one\.ckpt' must "):
        evaluate_checkpoints(tmp_path, spectrum(), Learner(), data())


def test_weights_alone(run: Any, tmp_path: Path) -> None:
    """A checkpoint without the optimizer's state: the learning rate is that of configure_optimizers."""
    checkpoint = torch.load(run[0] / "step=3.ckpt", weights_only=True)
    torch.save(without(checkpoint, "optimizer_states"), tmp_path / "one.ckpt")
    monitor = BatchSharpnessMonitor(num_batches=16)
    found = evaluate_checkpoints(tmp_path, monitor, Learner(), data(), trainer=make_trainer())
    assert found.curve("two_over_lr") == [100.0]
