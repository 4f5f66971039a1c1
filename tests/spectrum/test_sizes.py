"""Micro-batches of other sizes than the step's, spectra of one parameter and of many, eigenvectors from elsewhere."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers.counting import on_forward
from tests.helpers.runs import Capture, Classifier, make_trainer, mlp, rows
from tests.helpers.spectrum import monitor, samples
from tests.helpers.spectrum_runs import BATCH, SAMPLES, batches, fitted, parts, sgd
from tests.oracles.hessian_spectrum import Curvature

# Micro-batches, or batches of the probe loader, of other sizes than the eight samples of a step: the groups are eight.
SIZES: list[dict[str, Any]] = [{"micro_batch_size": size} for size in (3, 20, 40)]
SIZES += [{"probe_dataloader": batches(4)}, {"probe_dataloader": batches(SAMPLES)}]


@pytest.mark.slow
def test_second_moment_is_that_of_steps_whatever_the_micro_batches() -> None:
    found = []
    for options in ({}, *SIZES):
        module = Classifier(mlp(4, 6, 3), lambda m: torch.optim.SGD(m.parameters(), lr=5.0))
        ask = monitor("second_moment_contraction", **options)
        found_rows, moments, said = fitted(module, ask, steps=1)
        assert said == []
        row = found_rows[0]
        found.append(row["second_moment_excess"])
        curvature = Curvature(module.network, module.loss, moments.all[0])
        matrix = curvature.contraction([[part] for part in parts(BATCH)], lr=5.0)
        truth = float(torch.linalg.eigvalsh(matrix)[-1])
        assert row["second_moment_contraction"] == pytest.approx(truth, rel=1e-9), options
    # The same sums in another order, from the same random start: rounding, through some twenty products.
    assert found == pytest.approx([found[0]] * len(found), rel=1e-9)
    # Micro-batches for groups would give another number: at this step size by a lot.
    wrong = torch.linalg.eigvalsh(curvature.contraction([[part] for part in parts(20)], lr=5.0))[-1]
    assert abs(float(wrong) - 1.0 - found[0]) > 1e-3 * abs(found[0])


def test_no_stray_sample_where_the_loader_drops_the_last() -> None:
    """BatchNorm has no statistics of one sample, which the 33rd would be."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()
    module, sizes = Classifier(network, sgd), []
    on_forward(network, lambda m, args, output: sizes.append(len(args[0])))
    data = DataLoader(TensorDataset(*samples(33)), batch_size=BATCH, shuffle=True, drop_last=True)
    found, _, said = fitted(module, monitor("lambda_max", "lambda_min"), data=data)
    assert set(sizes) == {BATCH}
    assert list(found) == [0, 2, 4]
    for row in found.values():
        assert row["lambda_max"] > 0.0
        assert row["lambda_max_converged"] == row["lambda_min_converged"] == 1.0
        assert all(math.isfinite(value) for key, value in row.items() if key != "lambda_max_upper")
    assert len(said) == 1  # of BatchNorm
    assert said[0].startswith("BatchNorm in training mode couples samples")


class Diagonal(pl.LightningModule):
    """½ Σ dᵢ wᵢ²: its Hessian has the eigenvalues dᵢ. From step 1 on another than at step 0 is the largest."""

    def __init__(self, size: int, complex_weight: bool = False) -> None:
        super().__init__()
        self.network = nn.Module()
        self.network.weight = nn.Parameter(torch.ones(size, dtype=torch.complex64 if complex_weight else torch.float32))
        values = torch.rand(size, generator=torch.Generator().manual_seed(9)) - 0.2
        values[0] = 10.0
        self.register_buffer("values", values)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.values[1:2] = 11.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return 0.5 * (self.values * self.network.weight.abs().square()).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.network.parameters(), lr=0.01)


@pytest.mark.parametrize("seed", range(3))
def test_an_eigenvalue_that_overtakes_is_found_by_the_next_search_that_begins_anew(seed: int) -> None:
    capture = Capture()
    watch = monitor("lambda_max", every_n_train_steps=1, recheck_every=3, tolerance=1e-3, seed=seed)
    trainer = make_trainer(watch, logger=capture, max_steps=5, precision="32-true")
    trainer.fit(Diagonal(20_000), DataLoader(torch.zeros(5, 1), batch_size=1))
    found = list(rows(capture).values())
    # Errors below the tolerance; roundings of 6e-8 of some sums.
    assert [row["lambda_max"] for row in found] == pytest.approx([10.0, 10.0, 10.0, 11.0, 11.0], rel=1e-3)
    assert [math.isfinite(row["lambda_max_upper"]) for row in found] == [True, False, False, True, False]
    assert all(row["lambda_max"] <= row["lambda_max_upper"] <= 1.101 * row["lambda_max"] for row in found[::3])
    assert "went on" in watch.result.reasons["lambda_max_upper"]


def test_one_parameter_has_a_trace() -> None:
    capture = Capture()
    trainer = make_trainer(monitor("hessian_trace"), logger=capture, max_steps=1, precision="32-true")
    trainer.fit(Diagonal(1), DataLoader(torch.zeros(4, 1), batch_size=2))
    (row,) = rows(capture).values()
    # One product in float32.
    assert row == {"hessian_trace": pytest.approx(10.0, rel=1e-6), "hessian_trace_stderr": 0.0}


def test_complex_parameters_are_refused() -> None:
    trainer = make_trainer(monitor("lambda_max"), max_steps=1)
    with pytest.raises(MisconfigurationException) as caught:
        trainer.fit(Diagonal(3, complex_weight=True), DataLoader(torch.zeros(4, 1), batch_size=2))
    assert str(caught.value) == (
        "HessianSpectrumMonitor must find real parameters, got complex ones: train their real and imaginary parts."
    )


def test_loaded_eigenvectors_are_not_altered() -> None:
    first = monitor("lambda_max")
    fitted(Classifier(mlp(4, 6, 3), sgd), first, steps=1)
    state = first.state_dict()
    (loaded,) = state["eigenpairs"]["hessian"]["pairs"]["vectors"]
    before = loaded.clone()
    second = monitor("lambda_max")
    second.load_state_dict(state)
    fitted(Classifier(mlp(4, 6, 3), sgd), second)
    assert torch.equal(loaded, before)
    assert state["eigenpairs"]["hessian"]["pairs"]["vectors"][0] is loaded
    assert second.state_dict()["eigenpairs"]["hessian"]["pairs"]["vectors"][0] is not loaded
