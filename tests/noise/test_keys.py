"""Every number that the monitor writes, from dense matrices at the parameters as they were."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset

from lightning_curvature.noise.options import QUANTITIES
from tests.helpers.noise import (
    BATCH,
    OF_VECTORS,
    TOP,
    Plain,
    dense,
    evaluated,
    expected,
    line,
    module_of,
    monitor,
    network,
    samples,
    squared,
)
from tests.helpers.runs import classification, loader, make_trainer
from tests.oracles.dense import Loss
from tests.oracles.noise import (
    Pairs,
    activations_of,
    descending,
    duality_of,
    in_coordinates,
    nearest_of_class,
)


def pairs_of(data: TensorDataset, size: int, batches: Any = None) -> list[Pairs]:
    """Mini-batches against each other: halves of every micro-batch, class by class in turn."""
    x, y = data.tensors
    found = []
    for first in range(0, len(y), size):
        numbers = sorted(range(first, min(first + size, len(y))), key=lambda i: int(y[i]))
        halves = numbers[0::2], numbers[1::2]
        found += [nearest_of_class(x, y.tolist(), own, other) for own, other in (halves, halves[::-1])]
    return [pairs for pairs in found if pairs]


def assert_row(row: dict[str, float], wanted: dict[str, float]) -> None:
    for key, value in wanted.items():
        assert row[key] == pytest.approx(value, rel=OF_VECTORS), key


@pytest.mark.parametrize("loss", [F.cross_entropy, squared])
@pytest.mark.parametrize("name", ["0.weight", "2.weight"])
@pytest.mark.parametrize("general", [False, True])
@pytest.mark.thinned(3)
def test_every_key(name: str, loss: Loss, general: bool) -> None:
    module = module_of(network(nn.Tanh), loss)
    one = dense(module, name)
    if general:
        module.network[int(name[0])] = Plain(module.network[int(name[0])])
    result = evaluated(module, name, top=TOP)
    assert result.route == ("general" if general else "kronecker")
    row = result.values(QUANTITIES[:-1])
    wanted = expected(one, BATCH)
    assert row.keys() == wanted.keys()
    assert_row(row, wanted)


@pytest.mark.parametrize(
    ("data", "options", "own", "size"),
    [
        (lambda: DataLoader(samples(), batch_size=BATCH), {}, {}, 8),
        (lambda: DataLoader(samples(), batch_size=BATCH), {"accumulate_grad_batches": 2}, {}, 16),
        (lambda: DataLoader(samples(), batch_size=BATCH), {"accumulate_grad_batches": 2}, {"batch_size": 5}, 5),
        (lambda: DataLoader(samples(), batch_size=BATCH), {}, {"micro_batch_size": 3}, 8),
        (lambda: loader(classification(3)), {"accumulate_grad_batches": 3}, {}, 24),
        (
            lambda: DataLoader(samples(), batch_sampler=BatchSampler(SequentialSampler(samples()), BATCH, False)),
            {"accumulate_grad_batches": 2},
            {"micro_batch_size": 3},
            16,
        ),
        (lambda: DataLoader(samples(), batch_size=BATCH), {}, {"quantities": QUANTITIES}, 8),
    ],
)
def test_samples_of_a_step(data: Any, options: Any, own: Any, size: int) -> None:
    """C is that of the gradient of an optimizer step, however its samples are cut."""
    follow = monitor("0.weight", **own)
    make_trainer(follow, **options).fit(module_of(network()), data())
    assert follow.result is not None
    assert follow.result.batch_size == size


def test_accumulation_by_schedule() -> None:
    from lightning.pytorch.callbacks import GradientAccumulationScheduler

    found: list[int] = []

    class Noting(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            if follow.result is not None and follow.result.batch_size not in found:
                found.append(follow.result.batch_size)

    follow = monitor("0.weight", every_n_train_steps=1)
    make_trainer(Noting(), follow, GradientAccumulationScheduler({0: 1, 1: 3}), max_epochs=2).fit(
        module_of(network()), DataLoader(samples(), batch_size=BATCH)
    )
    assert found == [8, 24]


@pytest.mark.parametrize("size", [None, 6, 22])
@pytest.mark.parametrize("name", ["0.weight", "2.weight"])
@pytest.mark.thinned(4)
def test_chain_of_approximations(name: str, size: int | None) -> None:
    """From the same halves of the same micro-batches; by default two batches of the loader are one of them."""
    module, data = module_of(network()), samples(classes=2)
    result = evaluated(module, name, data, quantities=("noise_awd_chain",), micro_batch_size=size)
    one = dense(module, name, data)
    weight = module.network.get_parameter(name)
    halves = pairs_of(data, size or 2 * BATCH)
    truth = duality_of(one, weight, activations_of(module.network, name, data.tensors[0]), halves)
    assert result.weight_variance == pytest.approx(truth.weight_variance, rel=1e-10)
    assert result.unpaired == pytest.approx(1.0 - sum(map(len, halves)) / len(data), abs=1e-12)
    row, covariance = result.values(("noise_awd_chain",)), one.covariance(BATCH)
    assert row.keys() == {f"noise_gamma_awd_{key}" for key in ("raw", "hh", "hh_sd", "hh_sd_wd", "hh_sd_wd_li")}
    assert not result.reasons
    for key, link in result.chain.items():
        matrix = truth.matrices[key] / BATCH
        values, vectors = descending(one.hessian())
        diagonal = (vectors @ matrix @ vectors.T).diagonal()
        # In directions of no curvature eigenvectors are any.
        seen = values > 1e-3 * values[0]
        torch.testing.assert_close(link.diagonal[seen], diagonal[seen], rtol=1e-7, atol=1e-12 * float(diagonal.max()))
        assert link.norm == pytest.approx(float(matrix.norm()), rel=1e-10), key
        assert link.distance == pytest.approx(float((matrix - covariance).norm() / covariance.norm()), rel=1e-10), key
        if key not in ("hg", "gg"):
            gamma = line(result.curvatures, link.diagonal)[0]
            assert row[f"noise_gamma_awd_{key}"] == pytest.approx(gamma, rel=1e-9), key


def test_a_pairing_of_the_users() -> None:
    """By what it gives, not by what the batch holds."""
    module, data = module_of(network()), samples()
    x = torch.randn(len(data), 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    y = torch.arange(len(data)) % 2
    place = {tuple(row.tolist()): i for i, row in enumerate(data.tensors[0])}

    def pairing(batch: Any) -> tuple[Tensor, Tensor]:
        numbers = [place[tuple(row.tolist())] for row in batch[0]]
        return x[numbers], y[numbers]

    result = evaluated(module, "0.weight", data, quantities=("noise_awd_chain",), pairing=pairing)
    one, halves = dense(module, "0.weight", data), pairs_of(TensorDataset(x, y), 2 * BATCH)
    activations = activations_of(module.network, "0.weight", data.tensors[0])
    truth = duality_of(one, module.network[0].weight, activations, halves)
    assert result.weight_variance == pytest.approx(truth.weight_variance, rel=1e-10)
    assert result.chain["raw"].norm == pytest.approx(float(truth.matrices["raw"].norm()) / BATCH, rel=1e-10)
    assert in_coordinates(result.curvatures, result.vectors).shape == (20, 20)
