"""Many mini-batches differentiated at once: the same numbers, fewer passes; one after the other where it cannot be."""

from __future__ import annotations

import math
import random
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_curvature import CurvatureWarning
from lightning_curvature.batch_sharpness import at_once, measurement
from lightning_curvature.batch_sharpness.options import OF_UPDATES
from lightning_curvature.batch_sharpness.pairs import PairMoments
from lightning_curvature.operators import GaussNewtonOperator, HessianOperator
from tests.helpers.batch_sharpness import Run, counted, fit, learner, monitor, plain_run, samples, sgd
from tests.helpers.counting import Passes
from tests.helpers.runs import Classifier, mlp

# Sums of a few hundred products in another order, as in ``test_sharpness_values.py``.
SAME = 1e-10
OWN, CROSS = ("batch_sharpness", "modified_batch_sharpness"), ("ias", "gni")


def same(one: Run, other: Run, tolerance: float = SAME) -> None:
    """All values of two runs are the same, and they took as many draws."""
    assert list(one.rows) == list(other.rows)
    assert one.rows
    for step, row in one.rows.items():
        assert row.keys() == other.rows[step].keys()
        for key, value in row.items():
            if key.endswith("_batches"):
                assert value == other.rows[step][key], key
            else:
                # Standard errors are roots of what is left of a difference.
                assert value == pytest.approx(other.rows[step][key], rel=tolerance, abs=1e-9, nan_ok=True), key


def whether_at_once(run: Run) -> bool:
    return (run.beside.follow._measurement.pairs_at_once or 1) > 1


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("count", [2, 5, 8, 64])
@pytest.mark.thinned(8)
def test_as_one_after_the_other(count: int, curvature: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And as the dense matrices have it, for any number at once, also more than are wanted."""
    chosen: list[int] = []
    real = at_once.pairs_at_once
    monkeypatch.setattr(measurement, "pairs_at_once", lambda *args: chosen.append(real(*args)) or chosen[-1])
    together = fit(monitor(curvature=curvature, batches_at_once=count))
    assert chosen == [(count + 1) // 2]  # once for the two measurements of a run
    in_turn = plain_run(curvature, at_once=1)
    assert not whether_at_once(in_turn)
    same(together, in_turn)
    together.check(curvature)


@pytest.mark.parametrize(
    ("options", "trainer"),
    [
        ({"batch_size": 9, "micro_batch_size": 2}, {}),  # ragged: 2, 2, 2, 2, 1
        ({"micro_batch_size": 4}, {"accumulate_grad_batches": 2, "max_epochs": 2}),
        ({"num_batches": 7, "relative_error": 1e-9}, {}),
        ({"objective": lambda module, batch: F.cross_entropy(module(batch[0]), batch[1])}, {}),
    ],
    ids=["ragged", "accumulated", "the most", "objective"],
)
@pytest.mark.thinned(4)
def test_of_several_micro_batches(options: dict[str, Any], trainer: dict[str, Any]) -> None:
    in_turn, together = (
        fit(monitor(**({"batches_at_once": n, "num_batches": 8} | options)), **trainer) for n in (1, 8)
    )
    same(together, in_turn)


class Tied(nn.Module):
    """A parameter used twice, a frozen one, a buffer, and one that the loss does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)
        self.tied = self.first
        self.frozen = nn.Parameter(torch.full((3,), 0.5), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(2))
        self.register_buffer("scale", torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.tied(torch.tanh(self.first(x))))) * self.scale + self.frozen


def test_tied_frozen_and_unused_parameters() -> None:
    def module() -> Classifier:
        torch.manual_seed(3)
        return Classifier(Tied().double(), sgd)

    in_turn, together = (fit(monitor(batches_at_once=n), module()) for n in (1, 8))
    same(together, in_turn)


@pytest.mark.parametrize(
    ("quantities", "products"),
    [
        (("batch_sharpness",), 1),
        (OWN, 1),
        (CROSS, 1),
        (("lambda_gen",), 1),
        (("update_sharpness",), 1),
        ((*OWN, *CROSS, *OF_UPDATES), 4),
    ],
)
@pytest.mark.parametrize("operator", [HessianOperator, GaussNewtonOperator])
def test_products_of_many(
    quantities: tuple[str, ...], products: int, operator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One forward and so many products for six mini-batches at once; to choose, a pair is measured in both ways."""
    made = counted(monkeypatch, operator, "product_of")
    module = learner()
    passes = Passes(module.network)
    kind = "hessian" if operator is HessianOperator else "gauss_newton"
    options = {"num_batches": 12, "min_batches": 12, "batches_at_once": 6, "curvature": kind}
    fit(monitor(*quantities, **options), module, callbacks_before=[passes])
    whole = 4 if {"gni", "lambda_gen"} & set(quantities) else 0
    # In turn two forwards and two products, at once one of each; the first time the step is checked once.
    assert passes.forwards == [1 + whole + 2 + 3 + 1, 1, 1 + whole + 2, 1]
    assert len(made) == 2 * 2 * products + 3


def test_auto_takes_small_models_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [whether_at_once(fit(monitor(*OWN))), whether_at_once(fit(monitor(*OWN, batches_at_once=1)))] == [
        True,
        False,
    ]
    assert not whether_at_once(fit(monitor("lambda_max_b")))
    assert not whether_at_once(fit(monitor("ias", full_hessian="exact")))
    network = mlp(4, 3, 3)
    count = sum(p.numel() for p in network.parameters())
    monkeypatch.setattr(at_once, "_PARAMETERS", count - 1)
    assert not whether_at_once(fit(monitor(*OWN)))
    monkeypatch.setattr(at_once, "_PARAMETERS", count)
    # Two layers, 4 samples: two operations an entry of the weights and a sample.
    monkeypatch.setattr(at_once, "_OPERATIONS", 2 * 4 * (4 * 3 + 3 * 3))
    assert whether_at_once(fit(monitor(*OWN)))
    monkeypatch.setattr(at_once, "_OPERATIONS", 2 * 4 * (4 * 3 + 3 * 3) - 1)
    assert not whether_at_once(fit(monitor(*OWN)))


class Odd(Classifier):
    """A step that cannot be followed by vmap, or that would give other numbers there."""

    def __init__(self, kind: str) -> None:
        super().__init__(mlp(4, 3, 3), sgd)
        self.kind = kind
        self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(4).double()
        self.elsewhere = [next(self.network.parameters())]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        if self.kind == "dropout":
            x = self.drop(x)
        if self.kind == "norm":
            x = self.norm(x)
        loss = F.cross_entropy(self.network(x), y)
        if self.kind == "item":
            return loss * (1.0 if loss.item() > 0.0 else 2.0)
        if self.kind == "python":
            return loss * random.uniform(0.5, 2.0)
        if self.kind == "elsewhere":
            return loss + self.elsewhere[0].square().sum()
        return loss


@pytest.mark.parametrize("kind", ["dropout", "norm", "item", "python", "elsewhere"])
@pytest.mark.thinned(5)
def test_one_after_the_other_where_it_cannot_be(kind: str) -> None:
    """To the bit what it is when asked for; a warning only where somebody has asked for more."""
    found, said = [], []
    for count in (1, "auto", 8):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            random.seed(0)
            # More than a first pair, in which it is seen that they cannot be.
            found.append(fit(monitor(*OWN, *CROSS, batches_at_once=count, num_batches=8), Odd(kind)))
        said.append([str(w.message) for w in caught if w.category is CurvatureWarning and "at_once" in str(w.message)])
    assert found[0].rows == found[1].rows == found[2].rows
    assert said[:2] == [[], []]
    (sentence,) = said[2]
    assert sentence.startswith("batches_at_once must be 1 for a training step that torch.vmap cannot repeat, got 8 (")
    assert sentence.endswith("): mini-batches are measured one after the other.")


class Lengths(IterableDataset[Any]):
    """Whole batches of different sizes."""

    def __iter__(self) -> Any:
        x, y = samples()
        yield from [(x[:4], y[:4]), (x[4:8], y[4:8]), (x[8:12], y[8:12]), (x[11:], y[11:])]


def test_batches_of_different_sizes() -> None:
    """Those of one size would do at once; a round with another one among them is measured in turn."""
    options: dict[str, Any] = {"num_batches": 24, "min_batches": 24}
    in_turn, together = (
        fit(monitor(*OWN, *CROSS, batches_at_once=n, **options), data=DataLoader(Lengths(), batch_size=None))
        for n in (1, 2)
    )
    same(together, in_turn)


def test_an_error_of_both_ways_is_told() -> None:
    """Choosing is no measurement: what fails there fails again where it is reported."""

    def broken(module: Any, batch: Any) -> Tensor:
        raise RuntimeError("no loss today")

    with pytest.raises(RuntimeError, match="no loss today"):
        fit(monitor(*OWN, objective=broken))


def test_same_but_for_rounding() -> None:
    def pair(x: float, y: float, zeros: int = 0) -> PairMoments:
        made = PairMoments(zero_gradients=zeros)
        made.add("modified_batch_sharpness", x, y)
        return made

    assert at_once.same(pair(1.0, 2.0), pair(1.0 + 1e-6, 2.0 - 1e-6))
    assert not at_once.same(pair(1.0, 2.0), pair(1.01, 2.0))
    assert not at_once.same(pair(1.0, 2.0), pair(1.0, 1.99))
    assert not at_once.same(pair(1.0, 2.0), pair(1.0, 2.0, zeros=1))
    assert not at_once.same(pair(1.0, 2.0), pair(math.nan, 2.0))
    assert not at_once.same(pair(1.0, 2.0), PairMoments())


def test_draws_in_float32() -> None:
    """Both ways are the same but for the rounding of float32: 6e-8 for each of some hundred terms."""

    def module() -> Classifier:
        torch.manual_seed(1)
        return Classifier(mlp(4, 8, 3).float(), sgd)

    x, y = samples()
    data = DataLoader(torch.utils.data.TensorDataset(x.float(), y), batch_size=4, shuffle=True)
    options: dict[str, Any] = {"num_batches": 12, "min_batches": 12, "relative_error": 1e-9}
    in_turn, together = (fit(monitor(*OWN, *CROSS, batches_at_once=n, **options), module(), data=data) for n in (1, 12))
    same(together, in_turn, tolerance=1e-5)
