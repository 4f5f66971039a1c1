"""What is tried first: numbers of numpy, data without a loader, losses that couple samples."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_curvature import CurvatureWarning, StabilizationMonitor
from lightning_curvature.data.ordered import read_ordered_samples
from tests.helpers.runs import Classifier, classification, make_trainer, mlp
from tests.oracles.sample_growth import order_of

QUICK: dict[str, Any] = {"sample_sizes": (2, 4), "subspace_dim": 1, "candidates": 2, "trace_vectors": 3}


def module() -> Classifier:
    torch.manual_seed(0)
    return Classifier(mlp(4, 5, 3), lambda m: torch.optim.SGD(m.parameters(), lr=0.1))


def data() -> TensorDataset:
    return TensorDataset(*classification(1, size=20)[0])


def test_numbers_of_numpy() -> None:
    monitor = StabilizationMonitor(
        sample_sizes=np.array([4, 2]), subspace_dim=np.int64(1), sigma=np.logspace(-4, -2, 3), candidates=2
    )
    assert monitor.options.sample_sizes == (2, 4)
    assert monitor.options.subspace_dims == (1,)
    assert monitor.options.sigmas == (1e-4, 1e-3, 1e-2)
    assert all(type(sigma) is float for sigma in monitor.options.sigmas)


def test_a_dataset_in_place_of_a_loader() -> None:
    with pytest.raises(
        MisconfigurationException, match=r"dataloader must be one dataloader, .*, got a TensorDataset: wrap it"
    ):
        StabilizationMonitor(**QUICK).evaluate(module(), data(), trainer=make_trainer())


@pytest.mark.parametrize("given", [nn.Linear(4, 3), "last.ckpt"])
def test_no_lightning_module(given: Any) -> None:
    name = type(given).__name__
    with pytest.raises(
        MisconfigurationException, match=f"module must be a LightningModule, .*, got a {name}: wrap the"
    ):
        StabilizationMonitor(**QUICK).evaluate(given, DataLoader(data(), batch_size=4), trainer=make_trainer())


class Contrastive(pl.LightningModule):
    """Each sample against the others of its batch: alone it has nothing to be told from."""

    def __init__(self) -> None:
        super().__init__()
        self.network = mlp(4, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        z = self.network(batch[0])
        return nn.functional.cross_entropy(z @ z.T, torch.arange(len(z)))


def test_a_loss_that_couples_samples() -> None:
    with pytest.warns(CurvatureWarning, match="one more sample changes nothing: .* couples the samples of a batch"):
        growth = (
            StabilizationMonitor(**QUICK)
            .evaluate(Contrastive(), DataLoader(data(), batch_size=4), trainer=make_trainer())
            .result
        )
    assert {row.value for row in growth.rows} == {0.0}


def test_the_order_does_not_depend_on_how_many_are_taken() -> None:
    numbers = DataLoader(range(100), batch_size=8)  # type: ignore[arg-type]
    for seed in (0, 7):
        expected = order_of(100, seed)
        for count in (1, 9, 100):
            found = read_ordered_samples(make_trainer(), numbers, samples=count, seed=seed)
            assert [int(one.batch) for one in found.own.values()] == expected[:count]
    loader = DataLoader(data(), batch_size=4)
    alone, among = (
        StabilizationMonitor(**(QUICK | {"sample_sizes": sizes}))
        .evaluate(module(), loader, trainer=make_trainer())
        .result
        for sizes in ((4,), (4, 12))
    )
    value, same = (next(r.value for r in growth.rows if r.k == 4) for growth in (alone, among))
    assert value == pytest.approx(same, rel=1e-12)


def test_one_new_sample_has_no_standard_error() -> None:
    growth = (
        StabilizationMonitor(**(QUICK | {"candidates": 1}))
        .evaluate(module(), DataLoader(data(), batch_size=4), trainer=make_trainer())
        .result
    )
    values = growth.headline()
    assert all(np.isnan(value) == key.endswith("_stderr") for key, value in values.items())
    validated = {key: getattr(growth, key) for key in ("validated_sigma", "validated_sigma_full_space")}
    assert growth.values() == pytest.approx(values | validated, rel=0.0, abs=0.0, nan_ok=True)
    assert growth.reasons == {
        key: "one new sample has no standard error: raise candidates" for key in values if key.endswith("_stderr")
    }


def test_a_value_that_is_nan_has_a_reason() -> None:
    wide = StabilizationMonitor(**(QUICK | {"sigma": 30.0}))
    with pytest.warns(CurvatureWarning, match="sigma must be small enough"):
        growth = wide.evaluate(module(), DataLoader(data(), batch_size=4), trainer=make_trainer()).result
    reason = "the quadratic model is within 10% at no sigma: lower sigma"
    assert growth.reasons == dict.fromkeys(("validated_sigma", "validated_sigma_full_space"), reason)
    assert list(growth.reasons) == [key for key, value in growth.values().items() if np.isnan(value)]

    class Infinite(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * torch.inf

    alone = StabilizationMonitor(**(QUICK | {"quantities": ("delta_1",)}))
    infinite = Infinite(mlp(4, 5, 3), lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
    growth = alone.evaluate(infinite, DataLoader(data(), batch_size=4), trainer=make_trainer()).result
    assert growth.reasons == dict.fromkeys(("delta_1", "delta_1_stderr"), "a loss is not finite")


def test_results_are_frozen() -> None:
    growth = (
        StabilizationMonitor(**QUICK)
        .evaluate(module(), DataLoader(data(), batch_size=4), trainer=make_trainer())
        .result
    )
    assert type(growth.rows) is tuple
    with pytest.raises(AttributeError, match="cannot assign to field 'rows'"):
        growth.rows = ()  # type: ignore[misc]
