"""Every mistake gets one sentence, before the first step where it can be known: argument, rule, value, remedy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_curvature import StabilizationMonitor
from lightning_curvature.stabilization.options import ESTIMATORS
from lightning_curvature.stabilization.result import SampleGrowth
from tests.helpers.modules import Plain, sgd, sharded, unending
from tests.helpers.runs import Capture, Classifier, classification, loader, make_trainer, mlp, rows, warned
from tests.helpers.stabilization import Complex, samples
from tests.helpers.traps import Boom, Stream, Unreadable


def test_numbers_may_stand_alone() -> None:
    options = StabilizationMonitor(sample_sizes=4, subspace_dim=[4, 1, 4], sigma=1, at_steps=2).options  # type: ignore[arg-type]
    assert (options.sample_sizes, options.subspace_dims, options.sigmas) == ((4,), (4, 1), (1.0,))


def monitor(**options: Any) -> StabilizationMonitor:
    quick: dict[str, Any] = {
        "sample_sizes": (2, 3),
        "subspace_dim": 2,
        "candidates": 2,
        "draws": 4,
        "trace_vectors": 3,
        "tolerance": 0.1,
        "estimators": ESTIMATORS,
    }
    return StabilizationMonitor(**(quick | options))


SINGLE = r"the dataloader must make batches of single samples, got a {} that hands out whole ones: give probe_dataload"


def evaluated(follow: Any, module: Any) -> tuple[SampleGrowth, list[str]]:
    """What an evaluation finds, and what it warns of."""
    found: list[SampleGrowth] = []
    said = warned(lambda: found.append(follow.evaluate(module, samples(), trainer=make_trainer()).result))
    return found[0], said


def test_shards_by_hand() -> None:
    sentence = "^module must have whole parameters for evaluate\\(\\), got sharded ones: load the checkpoint into a"
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        module = Plain()
        sharded(module)
        with pytest.raises(MisconfigurationException, match=sentence):
            monitor().evaluate(module, samples(), trainer=make_trainer())
    finally:
        dist.destroy_process_group()
    assert module.seen == 0


def test_dimensions_are_for_the_subspace_alone() -> None:
    follow = monitor(subspace_dim=12, quantities=("delta_1", "delta_2"), on_error="raise")
    make_trainer(follow).fit(Plain(nn.Linear(4, 3, bias=False).double()), samples())
    assert follow.result is not None


@pytest.mark.parametrize("data", [unending, lambda: DataLoader(Stream(), batch_size=1)])
def test_streams_are_read_as_far_as_needed(data: Any) -> None:
    follow = monitor(probe_dataloader=data(), on_error="raise")
    make_trainer(follow).fit(Plain(), samples())
    assert follow.result is not None


def test_unreadable_samples_are_no_reason_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Unreadable, "allowed", staticmethod(lambda: False))
    capture, trainer_of = Capture(), make_trainer
    follow = monitor(sample_sizes=(30,), probe_dataloader=DataLoader(Unreadable(), batch_size=8))
    trainer = trainer_of(follow, logger=capture)
    assert warned(lambda: trainer.fit(Plain(), samples())) == ["StabilizationMonitor logs NaN: Boom: unreadable"]
    assert trainer.global_step == 2
    assert all(math.isnan(value) for value in rows(capture)[2].values())
    with pytest.raises(Boom):
        follow.evaluate(Plain(), None, trainer=make_trainer())


N = 51  # parameters of the network
SHAPE = r"directions must return finite numbers, \(subspace_dim, parameters\) = \(2, 51\), got {}: return one row for"
DEPENDENT = r"directions must be linearly independent, got a vector {} that the ones before it span: give fewer, or ot"
DIRECTIONS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "too few": (lambda m: torch.eye(1, N), SHAPE.format(r"shape \(1, 51\)")),
    "too many": (lambda m: torch.eye(3, N), SHAPE.format(r"shape \(3, 51\)")),
    "of another module": (lambda m: torch.eye(2, N + 1), SHAPE.format(r"shape \(2, 52\)")),
    "one by itself": (lambda m: torch.ones(N), SHAPE.format(r"shape \(51,\)")),
    "not finite": (lambda m: torch.full((2, N), torch.nan), SHAPE.format("others")),
    "a list": (lambda m: list(torch.eye(2, N)), SHAPE.format("a list")),
    "nothing": (lambda m: None, SHAPE.format("a NoneType")),
    "zero": (lambda m: torch.zeros(2, N), DEPENDENT.format(0)),
    "the same twice": (lambda m: torch.ones(2, N), DEPENDENT.format(1)),
    # Twice the same but for rounding.
    "nearly the same": (lambda m: torch.ones(2, N).double() + 1e-16 * torch.eye(2, N), DEPENDENT.format(1)),
}


@pytest.mark.parametrize("name", DIRECTIONS)
def test_bad_directions(name: str) -> None:
    """A run that is over is not lost for them; asked for by hand, the sentence is raised."""
    make, sentence = DIRECTIONS[name]
    capture, follow = Capture(), monitor(directions=make)
    (said,) = warned(lambda: make_trainer(follow, logger=capture).fit(Plain(), samples()))
    assert said.startswith("StabilizationMonitor logs NaN: ")
    assert all(math.isnan(value) for value in rows(capture)[2].values())
    with pytest.raises((ValueError, MisconfigurationException), match=f"^{sentence}") as caught:
        follow.evaluate(Plain(), samples(), trainer=make_trainer())
    assert str(caught.value).endswith(".")


def test_samples_without_gradients_of_their_own_span_nothing() -> None:
    x, y = classification(1, 1)[0]
    same = DataLoader([(x[0], y[0])] * 8, batch_size=4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=DEPENDENT.format(1)):
        monitor(law="gradients").evaluate(Plain(), same, trainer=make_trainer())


class Constant(Plain):
    """A loss to which samples do not matter, to the last bit."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return sum(p.square().sum() for p in self.parameters()) + 0.0 * batch[0].sum()


def test_samples_that_are_all_alike() -> None:
    """One more changes nothing: there is no relative error of a model of nothing, and nobody is warned of one."""
    found, said = evaluated(monitor(), Constant())
    assert said == []
    # σ²‖c‖² of what rounding leaves of U.
    assert all(0.0 <= row.value <= 1e-25 for row in found.rows)
    assert math.isnan(found.validated_sigma)
    assert str(found)


def test_eigenvectors_that_were_not_found() -> None:
    follow = monitor(max_products=3, tolerance=1e-9, subspace_dim=2)
    found, said = evaluated(follow, Plain())
    assert said == [
        "eigenvectors did not converge within max_products=3 products: rows of the table say where. Raise max_products "
        "or tolerance, or lower subspace_dim."
    ]
    for row in found.rows:
        assert row.converged == (row.criterion != "delta_2_subspace")
        assert math.isfinite(row.value)
    # Ritz vectors of three products each: still an orthonormal basis with a known Hessian in it, so that all agree.
    by_estimator = {row.estimator: row for row in found.rows if row.k == 3 and row.criterion[-1] == "e"}
    assert set(by_estimator) == set(ESTIMATORS)
    exact = by_estimator["direct"].value
    assert by_estimator["quadratic"].value == pytest.approx(exact, rel=2.0 * by_estimator["direct"].model_error)


def test_sigma_beyond_the_model() -> None:
    capture, follow = Capture(), monitor(sigma=(1e-3, 30.0), estimators=("gaussian_moment",))
    said = warned(lambda: make_trainer(follow, logger=capture).fit(Plain(), samples()))
    assert follow.result is not None
    expected = []
    for where, suffix in (("subspace", "_subspace"), ("full space", "")):
        errors = [r.model_error for r in follow.result.rows if r.criterion == f"delta_2{suffix}" and r.sigma == 30.0]
        assert max(errors) > 0.1
        expected.append(
            f"sigma must be small enough for a quadratic model of the loss in the {where}, got 30, where it is off by "
            f"up to {max(errors):.0%}: trust 'direct' alone there, or a smaller sigma."
        )
    assert said == expected
    for key in ("validated_sigma", "validated_sigma_full_space"):
        assert rows(capture)[2][key] == getattr(follow.result, key) == 1e-3
    # Who does not ask for the model is not told of it.
    alone = monitor(sigma=(1e-3, 30.0), estimators=("direct",))
    assert warned(lambda: alone.evaluate(Plain(), samples(), trainer=make_trainer())) == []


class Overflowing(Plain):
    """A loss that is infinite away from where the parameters are."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        far = sum((p - 0.3).square().sum() for p in self.parameters()) > 1e4
        return super().training_step(batch, batch_idx) * torch.where(far, torch.inf, 1.0)


def test_sigma_beyond_all_numbers() -> None:
    follow = monitor(sigma=(1e-3, 1e3), estimators=("quadratic", "direct"), quantities=("delta_2_subspace",))
    found, (said,) = evaluated(follow, Overflowing())
    assert "got 1000, where it is off by up to inf%" in said
    assert found.validated_sigma == 1e-3
    for row in found.rows:
        assert math.isfinite(row.value) == (row.sigma == 1e-3 or row.estimator == "quadratic")


class Diverged(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * torch.nan


def test_a_loss_that_is_no_number() -> None:
    capture, follow = Capture(), monitor()
    trainer = make_trainer(follow, logger=capture)
    said = warned(lambda: trainer.fit(Diverged(), samples()))
    assert len(said) == 1
    assert trainer.global_step == 2
    assert all(math.isnan(value) for key, value in rows(capture)[2].items())


def frozen() -> pl.LightningModule:
    module = Plain()
    module.freeze()
    return module


BY_HAND: dict[str, tuple[Callable[[], pl.LightningModule], dict[str, Any], Any, str]] = {
    "no data": (Plain, {}, None, r"dataloader must be given where there is no Trainer's, got None: give a DataLoader"),
    "frozen module": (
        frozen,
        {},
        samples(),
        r"module must have parameters that require gradients, got none: call module.unfreeze\(\), or req",
    ),
    "complex parameters": (Complex, {}, samples(), r"StabilizationMonitor must find real parameters, got complex ones"),
    "too many directions": (Plain, {"subspace_dim": N}, samples(), r"subspace_dim must be below the .*, got 51 of 51"),
    "whole batches": (Plain, {}, loader(classification(2)), SINGLE.format("DataLoader")),
    "too few samples": (Plain, {}, samples(4), r"sample_sizes must leave a sample to be added, got 5 samples .* has 4"),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_misfits_by_hand(name: str) -> None:
    make, options, data, sentence = BY_HAND[name]
    with pytest.raises(MisconfigurationException, match=f"^{sentence}") as caught:
        monitor(**options).evaluate(make(), data, trainer=make_trainer())
    assert str(caught.value).endswith(".")


class OwnSteps(Classifier):
    """Two optimizers step in every batch: the count of steps goes up by two."""

    def __init__(self) -> None:
        super().__init__(mlp(4, 6, 3), sgd)
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [sgd(self.network[0]), sgd(self.network[2])]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(self(batch[0]), batch[1]))
            optimizer.step()


def test_a_step_that_is_passed_over_is_made_up_for() -> None:
    objective = lambda module, batch: module.loss(module(batch[0]), batch[1])  # noqa: E731
    measured: list[int] = []

    class Noting(StabilizationMonitor):
        def measure(self, trainer: Any, *args: Any) -> Any:
            measured.append(trainer.global_step)
            return super().measure(trainer, *args)

    options: dict[str, Any] = {"sample_sizes": (2,), "subspace_dim": 1, "at_steps": (0, 3, 8), "on_error": "raise"}
    follow = Noting(objective=objective, optimizer_index=1, at_end=False, quantities=("delta_1",), **options)
    make_trainer(follow, max_epochs=3).fit(OwnSteps(), samples())
    assert measured == [0, 4, 8]
