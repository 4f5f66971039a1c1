"""Steps that return None for some batches: found out by their source, and left out."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_curvature import (
    BatchSharpnessMonitor,
    CurvatureWarning,
    HessianSpectrumMonitor,
    NoiseCovarianceMonitor,
)
from lightning_curvature.losses.skipped import may_skip
from tests.helpers.counting import on_forward
from tests.helpers.runs import Batch, Capture, Classifier, make_trainer, mlp, rows


class Falls(Classifier):
    """Passes over a batch with a large number in it."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:  # type: ignore[override]
        return None if bool((batch[0] > 10.0).any()) else self.loss(self(batch[0]), batch[1])


class Shares(Classifier):
    """Does so in a method that it shares with validation."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:  # type: ignore[override]
        return self.shared(batch)

    def shared(self, batch: Batch) -> Tensor | None:
        if bool((batch[0] < 10.0).all()):
            return self.loss(self(batch[0]), batch[1])
        return None


class Notes(Classifier):
    """Calls a method that returns nothing."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.note(batch)
        with torch.enable_grad():
            return super().training_step(batch, batch_idx)

    def note(self, batch: Batch) -> None:
        if len(batch[0]) > 1000:
            return
        self.seen = len(batch[0])


class Cases(Classifier):
    """Always comes to a loss, or raises."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        def nothing() -> None:
            return None

        try:
            if batch_idx < 0:
                raise ValueError
            else:
                match len(batch):
                    case 2:
                        return super().training_step(batch, batch_idx)
                    case _:
                        while True:
                            nothing()
        except RuntimeError:
            return super().training_step(batch, batch_idx)


class Ends(Classifier):
    """Comes to its end without a value."""

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        if len(batch[0]):
            return super().training_step(batch, batch_idx)


class ByHand(Falls):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.automatic_optimization = False


class Recurs(Classifier):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.training_step(batch, batch_idx) if batch_idx < 0 else super().training_step(batch, batch_idx)


def sgd(module: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.1)


def made(kind: type[Classifier]) -> Any:
    return kind(mlp(4, 6, 3), sgd)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Falls, True),
        (Shares, True),
        (Ends, True),
        (Cases, False),
        (Notes, False),
        (Classifier, False),
        (ByHand, False),
        (Recurs, False),
    ],
)
def test_the_source_tells(kind: type[Classifier], expected: bool) -> None:
    assert may_skip(made(kind)) is expected


def test_a_step_that_is_no_function() -> None:
    class Odd(pl.LightningModule):
        training_step = staticmethod(torch.nn.functional.relu)  # type: ignore[assignment]

    assert may_skip(Odd()) is False


def data(skipped: tuple[int, ...], dropped: bool) -> DataLoader[Any]:
    """Five batches of 6 and one of 3; the step passes over some, or they are not there."""
    g = torch.Generator().manual_seed(3)
    x, y = torch.randn(33, 4, generator=g, dtype=torch.float64), torch.randint(3, (33,), generator=g)
    batches = [(x[i : i + 6].clone(), y[i : i + 6]) for i in range(0, 33, 6)]
    for index in skipped:
        batches[index][0][0, 0] = 20.0
    kept = [one for index, one in enumerate(batches) if not (dropped and index in skipped)]
    whole = TensorDataset(torch.cat([one[0] for one in kept]), torch.cat([one[1] for one in kept]))
    return DataLoader(whole, batch_size=6, shuffle=False)


MONITORS: dict[str, Any] = {
    "spectrum": (HessianSpectrumMonitor, {"quantities": ("lambda_max", "hessian_trace"), "tolerance": 1e-6}),
    "noise": (
        NoiseCovarianceMonitor,
        {"parameter": "network.0.weight", "quantities": ("noise_gamma",), "at_end": False},
    ),
}


def measured(name: str, kind: type[Classifier], skipped: tuple[int, ...], dropped: bool) -> tuple[Any, int, list[str]]:
    """Rows, forwards, and what is said, of two measurements at θ that does not move."""
    make, options = MONITORS[name]
    module, capture, passes = made(kind), Capture(), list[int]()
    module.make_optimizer = lambda m: torch.optim.SGD(m.parameters(), lr=0.0)
    on_forward(module.network, lambda *args: passes.append(1))
    follow = make(every_n_train_steps=1, probe_dataloader=data(skipped, dropped), **options)
    with pytest.warns() as said:
        make_trainer(follow, logger=capture, max_steps=2).fit(module, data((), False))
    return rows(capture), len(passes), [str(one.message) for one in said if one.category is CurvatureWarning]


@pytest.mark.parametrize("kind", [Falls, Shares])
@pytest.mark.parametrize("skipped", [(2,), (0, 5)])
@pytest.mark.parametrize("name", MONITORS)
@pytest.mark.thinned(8)
def test_values_are_those_of_the_others(name: str, skipped: tuple[int, ...], kind: type[Classifier]) -> None:
    found, passes, said = measured(name, kind, skipped, dropped=False)
    expected, least, nothing = measured(name, Classifier, skipped, dropped=True)
    assert nothing == []
    assert said == [f"training_step returns None for {len(skipped)} of 6 batches of the probe set: they are left out."]
    assert list(found) == list(expected) == [0, 1]
    for step, row in expected.items():
        assert any(math.isfinite(value) for value in row.values())
        for key, value in row.items():
            # The same sums but for the seeds of a search, over the same batches.
            assert found[step][key] == pytest.approx(value, rel=1e-5, abs=1e-9, nan_ok=True), key
    if name == "spectrum":
        # One look at each batch, once in a fit; those that are passed over make no forward.
        assert passes - least == 6 - len(skipped)


@pytest.mark.slow
def test_nothing_is_looked_at_where_the_source_returns_a_loss() -> None:
    one, passes, _ = measured("spectrum", Notes, (), dropped=False)
    other, least, _ = measured("spectrum", Classifier, (), dropped=False)
    assert passes == least
    assert repr(one) == repr(other)


def test_all_are_passed_over() -> None:
    found, _, said = measured("spectrum", Falls, (0, 1, 2, 3, 4, 5), dropped=False)
    assert all(math.isnan(row["lambda_max"]) for row in found.values())
    assert said[0] == (
        "HessianSpectrumMonitor logs NaN: ValueError: training_step must return a loss for a batch of each rank, got "
        "None for 6 of 6 batches of the probe set: give other data, probe_dataloader=."
    )


def test_pairs_with_such_a_mini_batch_are_left_out() -> None:
    """Sharpness is the mean over the others; none of what is drawn is drawn again."""
    module, capture = made(Falls), Capture()
    module.make_optimizer = lambda m: torch.optim.SGD(m.parameters(), lr=0.0)
    follow = BatchSharpnessMonitor(
        quantities=("batch_sharpness", "ias"),
        every_n_train_steps=1,
        num_batches=40,
        min_batches=40,
        batch_size=3,
        probe_dataloader=data((2,), False),
    )
    with pytest.warns(CurvatureWarning, match=r"returns None for a mini-batch of \d+ of 20 pairs that were drawn"):
        make_trainer(follow, logger=capture, max_steps=1).fit(module, data((), False))
    (row,) = rows(capture).values()
    assert row["batch_sharpness_batches"] == 40.0
    assert 0.0 < row["batch_sharpness_stderr"] < row["batch_sharpness"] < 10.0
