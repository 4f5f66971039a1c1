"""BatchSharpnessMonitor with other mini-batches, data and models than the plainest, against dense matrices."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, Subset, TensorDataset, WeightedRandomSampler

from lightning_curvature import BatchSharpnessMonitor
from lightning_curvature.batch_sharpness.measurement import SharpnessMeasurement
from lightning_curvature.batch_sharpness.options import OF_UPDATES
from tests.helpers import batch_sharpness
from tests.helpers.batch_sharpness import DRAWN, Run, Stream, fit, learner, loader, samples, sgd, whole_batches
from tests.helpers.runs import Classifier, make_trainer, mlp

# Sums over parts of a mini-batch in another order.
SAME = 1e-12


def monitor(*quantities: str, **options: Any) -> BatchSharpnessMonitor:
    """Of a few mini-batches: where drawing ends is not looked at here."""
    return batch_sharpness.monitor(*quantities, **({"num_batches": 8} | options))


def sizes(run: Run, name: str = "batch_sharpness") -> set[int]:
    return {len(b) for step, row in run.rows.items() for b in run.beside.draws(step, int(row[f"{name}_batches"]))}


@pytest.mark.parametrize(
    ("options", "trainer", "size"),
    [
        ({}, {"accumulate_grad_batches": 2, "max_epochs": 2}, 8),
        ({"batch_size": 3}, {}, 3),
        ({"batch_size": 3}, {"accumulate_grad_batches": 2, "max_epochs": 2}, 3),
        ({"batch_size": 9, "micro_batch_size": 2}, {}, 9),
        ({"probe_samples": 14, "batch_size": 14}, {}, 14),  # all of them: every draw is alike
    ],
    ids=str,
)
@pytest.mark.slow
def test_size_of_the_mini_batches(options: dict[str, Any], trainer: dict[str, Any], size: int) -> None:
    run = fit(monitor(**options), **trainer)
    assert len(run.rows) == 2
    assert sizes(run) == {size}
    if size < 14:
        run.check()
        return
    for row in run.rows.values():
        # All four are gᵀHg/‖g‖², to roundings of sums over the samples in other orders; so is their spread.
        for name in ("modified_batch_sharpness", "ias", "gni", "lambda_gen"):
            assert row[name] == pytest.approx(row["batch_sharpness"], rel=SAME)
        assert all(row[f"{name}_batches"] == 4.0 for name in DRAWN)
        assert all(row[f"{name}_stderr"] <= 1e-7 * row[name] for name in DRAWN)


@pytest.mark.slow
def test_micro_batches_of_a_mini_batch_make_no_difference() -> None:
    """8 + 2 samples of 10, or 10 at once."""
    cut, whole = (fit(monitor(batch_size=10, micro_batch_size=size)) for size in (8, 10))
    assert list(cut.rows) == list(whole.rows) == [0, 2]
    for step, row in cut.rows.items():
        for key, value in row.items():
            # A search for an eigenvalue sees other roundings, too.
            assert value == pytest.approx(whole.rows[step][key], rel=1e-10, abs=1e-12), key
    assert [part.size for part in cut.beside.populations[0].draw(0, 0)] == [8, 2]


@pytest.mark.slow
def test_draws_with_replacement() -> None:
    data = TensorDataset(*samples())
    run = fit(monitor(), data=DataLoader(data, batch_size=4, sampler=RandomSampler(data, replacement=True)))
    drawn = [batch for step in run.rows for batch in run.beside.draws(step, 24)]
    assert any(len(set(batch)) < len(batch) for batch in drawn)
    run.check()


def test_draws_by_weights() -> None:
    weights = [float(i % 3 == 0) for i in range(14)]
    run = fit(monitor(), data=loader(shuffle=False, sampler=WeightedRandomSampler(weights, 14)))
    drawn = [batch for step in run.rows for batch in run.beside.draws(step, 24)]
    assert {i for batch in drawn for i in batch} == {0, 3, 6, 9, 12}
    run.check(among=[0, 3, 6, 9, 12])


class Tied(nn.Module):
    """One weight twice, and a layer that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight, self.last = self.first.weight, nn.Linear(4, 3)
        self.double()
        self.last.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x).tanh()).tanh())


def test_tied_and_frozen_parameters() -> None:
    run = fit(monitor(), Classifier(Tied(), sgd))
    names = [name for name, p in run.module.network.named_parameters() if p.requires_grad]
    assert names == ["first.weight", "first.bias", "second.bias"]
    run.check()


def test_parameters_of_the_optimizer_alone_count() -> None:
    module = learner(lambda m: torch.optim.SGD(m.network[2].parameters(), lr=0.3))
    quantities = [name for name in DRAWN if name not in OF_UPDATES]
    fit(monitor(*quantities), module).check(names=["2.weight", "2.bias"])


def normed() -> Classifier:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Dropout(0.5), nn.Linear(3, 3)]
    layers[1].running_mean.normal_()  # type: ignore[union-attr, operator]
    layers[1].running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr, operator]
    return Classifier(nn.Sequential(*layers).double(), sgd)


@pytest.mark.slow
def test_batch_norm_and_dropout_in_eval_mode() -> None:
    run = fit(monitor(probe_mode="eval"), normed())
    run.check(training=False)
    with pytest.raises(AssertionError):
        fit(monitor(probe_mode="train"), normed()).check(training=False)


def test_a_subset_of_the_samples() -> None:
    """H, g and draws are of the same samples."""
    run = fit(monitor("ias", "gni", probe_samples=6, batch_size=6))
    chosen = {tuple(sorted(batch)) for step in run.rows for batch in run.beside.draws(step, 4)}
    assert len(chosen) == 1
    assert len(set(*chosen)) == 6
    for row in run.rows.values():
        assert row["ias"] == pytest.approx(row["gni"], rel=SAME)  # of the whole set: g_B = g


def test_a_dataloader_for_the_measurement() -> None:
    """Its samples, in mini-batches as large as those of training."""
    held = Subset(TensorDataset(*samples()), list(range(6)))
    run = fit(monitor(probe_dataloader=DataLoader(held, batch_size=5)))
    drawn = [batch for step in run.rows for batch in run.beside.draws(step, 24)]
    assert {i for batch in drawn for i in batch} == set(range(6))
    assert {len(batch) for batch in drawn} == {4}
    first = {(name, step): row[name] for step, row in run.rows.items() for name in ("batch_sharpness", "gni")}
    other = fit(monitor(probe_dataloader=DataLoader(Subset(held.dataset, list(range(6, 14))), batch_size=5)))
    assert all(abs(other.rows[step][name] / value - 1.0) > 1e-3 for (name, step), value in first.items())


@pytest.mark.parametrize("data", [lambda: DataLoader(Stream(), batch_size=4), whole_batches])
@pytest.mark.slow
def test_data_without_indices(data: Any) -> None:
    """Batches as the loader makes them; the ragged one of a loader that hands them out whole is one of them."""
    run = fit(
        monitor("batch_sharpness", "modified_batch_sharpness", "lambda_max_b", num_batches=24, relative_error=1e-9),
        data=data(),
    )
    blocks = {(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11)} | ({(12, 13)} if data is whole_batches else set())
    drawn = {tuple(batch) for step in run.rows for batch in run.beside.draws(step, 24)}
    assert drawn == blocks
    run.check()


def test_mini_batches_follow_the_size_of_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loader with other batches from the second epoch on, and accumulation from the third on."""

    class Growing(Classifier):
        def train_dataloader(self) -> DataLoader[Any]:
            return loader(2 if self.current_epoch == 0 else 5)

    class Scheduled(Growing):
        def on_train_epoch_start(self) -> None:
            self.trainer.accumulate_grad_batches = 2 if self.current_epoch == 2 else 1

    sizes_seen: dict[int, int] = {}
    follow = monitor("batch_sharpness", every_n_train_steps=1)
    measure = SharpnessMeasurement.measure

    def noted(measurement: SharpnessMeasurement, problem: Any, fail: Any) -> Any:
        sizes_seen[problem.key] = sum(part.size for part in problem.population.draw(0, 0))
        return measure(measurement, problem, fail)

    monkeypatch.setattr(SharpnessMeasurement, "measure", noted)
    module = Scheduled(mlp(4, 3, 3), sgd)
    make_trainer(follow, max_epochs=3, reload_dataloaders_every_n_epochs=1).fit(module)
    # 7 steps of 2 samples, 3 of 5, 2 of 10.
    assert list(sizes_seen.values()) == [2] * 7 + [5] * 3 + [10] * 2


def test_squared_error_and_other_losses() -> None:
    """Batches of regression targets; a loss whose Hessian has negative eigenvalues."""

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(z, F.one_hot(y, 3).to(z)) - 0.2 * z.square().mean()

    run = fit(monitor(), learner(loss=loss))
    run.check()
    assert all(math.isfinite(row[name]) for row in run.rows.values() for name in DRAWN)
    values = [row["batch_sharpness"] for row in run.rows.values()]
    assert len(set(values)) == 2
    assert list(itertools.chain(run.rows)) == [0, 2]
