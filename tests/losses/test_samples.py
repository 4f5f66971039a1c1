"""Losses of single samples: whole batches, ``vmap`` and one after the other must be the same numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_curvature import NoiseCovarianceMonitor, StabilizationMonitor
from lightning_curvature.data.ordered import read_ordered_samples
from lightning_curvature.losses.fixed import ProbeLoss
from lightning_curvature.losses.samples import SampleLosses, equal_up_to_rounding
from lightning_curvature.replay.isolation import attached
from lightning_curvature.replay.objective import StepObjective
from tests.helpers.runs import Classifier, make_trainer, mlp, warned
from tests.oracles.sample_growth import order_of

COUNT = 11


class Sequences(Dataset[tuple[Tensor, Tensor]]):
    """Sequences of several lengths, of which some places have no target."""

    def __init__(self, ragged: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        lengths = [3 + i % 3 if ragged else 5 for i in range(COUNT)]
        self.rows = [
            (torch.randint(0, 7, (n,), generator=generator), torch.randint(0, 7, (n,), generator=generator))
            for n in lengths
        ]
        for number, (_, targets) in enumerate(self.rows):
            targets[: number % 3] = -100

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.rows[index]


class Tokens(pl.LightningModule):
    """The mean over the places of a batch that have a target: not the mean over its samples."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.head(self.embedding(x)).flatten(0, 1), y.flatten(), ignore_index=-100)


def classifier(*layers: nn.Module, step: Callable[[Any, Any], Tensor] | None = None) -> Classifier:
    torch.manual_seed(0)
    module = Classifier(
        nn.Sequential(nn.Linear(3, 5), *layers, nn.Tanh(), nn.Linear(5, 4)),
        lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
    ).double()
    if step is not None:
        module.training_step = lambda batch, batch_idx: step(module, batch)  # type: ignore[method-assign]
    return module


def vectors() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(
        torch.randn(COUNT, 3, generator=generator, dtype=torch.float64),
        torch.randint(0, 4, (COUNT,), generator=generator),
    )


def reading_a_value(module: Any, batch: Any) -> Tensor:
    loss: Tensor = F.cross_entropy(module(batch[0]), batch[1])
    assert loss.item() > 0.0
    return loss


def summed(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1], reduction="sum")


CASES: dict[str, tuple[Callable[[], pl.LightningModule], Callable[[], Any], bool, bool]] = {
    # Module, data, whether batches are taken whole, whether ``vmap`` follows.
    "mean over samples": (classifier, vectors, True, True),
    "batch statistics that are fixed": (lambda: classifier(nn.BatchNorm1d(5)), vectors, True, True),
    "dropout that is off": (lambda: classifier(nn.Dropout()), vectors, True, True),
    "a value is read": (lambda: classifier(step=reading_a_value), vectors, True, False),
    "sum over samples": (lambda: classifier(step=summed), vectors, False, True),
    "mean over places": (Tokens, lambda: Sequences(ragged=False), False, True),
    "ragged": (Tokens, lambda: Sequences(ragged=True), False, True),
}


@pytest.mark.parametrize("name", CASES)
def test_all_ways_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make_module, make_data, whole, at_once = CASES[name]
    module, trainer = make_module().double(), make_trainer()
    loader = DataLoader(make_data(), batch_size=1 if name == "ragged" else 4)
    # Without any of the package: each sample alone, as the data is asked for.
    module.eval()
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    order = order_of(COUNT, seed=3)
    with torch.no_grad():
        rows = [loader.dataset[i] for i in order]
        expected = torch.stack([module.training_step((x[None], torch.as_tensor(y)[None]), 0) for x, y in rows])
    module.train()
    del module.log
    calls: list[str] = []
    for owner, method in ((ProbeLoss, "losses_of_many"), (ProbeLoss, "loss_of")):
        real = getattr(owner, method)
        monkeypatch.setattr(
            owner, method, lambda self, *args, real=real, method=method: calls.append(method) or real(self, *args)
        )
    with attached(trainer, module, [torch.optim.SGD(module.parameters(), lr=0.0)]):
        objective = StepObjective(module, trainer.strategy.root_device)
        samples = read_ordered_samples(trainer, loader, samples=COUNT, seed=3)
        losses = SampleLosses(
            ProbeLoss(trainer, objective, trainer.precision_plugin.train_step_context, "eval"), samples, size=4
        )
        numbers = [8, 0, 3, 10, 4]
        with torch.no_grad():
            # Sums of a few terms of size 1.
            torch.testing.assert_close(losses.each(numbers), expected[numbers], rtol=1e-13, atol=1e-13)
            torch.testing.assert_close(losses.one(7), expected[7], rtol=1e-13, atol=1e-13)
            parts = losses.parts(range(9), 9)
            mean = sum(part.weight * part.evaluate().loss for part in parts)
            torch.testing.assert_close(mean, expected[:9].mean(), rtol=1e-13, atol=1e-13)
            calls.clear()
            for part in parts:
                part.evaluate()
        assert math.fsum(part.weight for part in parts) == pytest.approx(1.0)
        if whole:
            assert calls == ["loss_of"] * 3  # 4 + 4 + 1, each batch in one
        elif name != "ragged":
            assert calls == ["losses_of_many", "losses_of_many", "loss_of"]
        assert losses._batched == at_once


def test_equal_up_to_rounding() -> None:
    """Every entry, relative to the other tensor; a loss that is not a number equals itself alone."""
    losses = torch.tensor([1.0, -2e-9, 0.0, math.nan], dtype=torch.float64)
    assert equal_up_to_rounding(losses * (1.0 + 0.9e-5), losses)
    for factors in ([1.0 + 2e-5, 1.0, 1.0, 1.0], [1.0, 1.0 + 2e-5, 1.0, 1.0], [1.0, 1.0, math.nan, 1.0]):
        assert not equal_up_to_rounding(losses * torch.tensor(factors, dtype=torch.float64), losses)
    assert not equal_up_to_rounding(torch.tensor(1e-30), torch.tensor(0.0))
    assert not equal_up_to_rounding(torch.tensor(1.0), torch.tensor(math.nan))


def test_the_batch_that_a_step_writes_into_comes_back() -> None:
    def writing(module: Any, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(module(x.mul_(2.0)), y)

    def doubling(module: Any, batch: Any) -> Tensor:
        return F.cross_entropy(module(2.0 * batch[0]), batch[1])

    plain = StabilizationMonitor(sample_sizes=(4,), subspace_dim=1, candidates=2)
    loader = DataLoader(vectors(), batch_size=4)
    expected = plain.evaluate(classifier(step=doubling), loader, trainer=make_trainer()).result
    found = plain.evaluate(classifier(step=writing), loader, trainer=make_trainer()).result
    for one, other in zip(expected.rows, found.rows, strict=True):
        assert other.value == pytest.approx(one.value, rel=1e-10)


def test_dropout_in_training_mode_has_one_mask_a_sample() -> None:
    """Random numbers cannot be drawn under ``vmap``; each sample then has its own mask, the same at every point."""
    module, loader = classifier(nn.Dropout()), DataLoader(vectors(), batch_size=4)
    monitor = StabilizationMonitor(
        sample_sizes=(4,), subspace_dim=1, candidates=2, probe_mode="train", estimators=("quadratic", "direct"), draws=4
    )
    first, second = (monitor.evaluate(module, loader, trainer=make_trainer()).result for _ in range(2))
    assert first.rows == second.rows
    modelled = [row for row in first.rows if row.estimator == "quadratic"]
    assert len(modelled) == 2
    # Were masks drawn anew at each probe, it would be off by the size of the loss.
    assert all(row.model_error < 1e-3 for row in modelled)


def test_another_objective() -> None:
    """The user gives the loss of a batch of one."""
    module, loader = classifier(), DataLoader(vectors(), batch_size=4)

    def objective(module: Any, batch: Any) -> Tensor:
        return 3.0 * F.cross_entropy(module(batch[0]), batch[1])

    options: dict[str, Any] = {"sample_sizes": (4,), "candidates": 2, "quantities": ("delta_1",)}
    plain = StabilizationMonitor(**options).evaluate(module, loader, trainer=make_trainer()).result
    tripled = (
        StabilizationMonitor(**options, objective=objective).evaluate(module, loader, trainer=make_trainer()).result
    )
    assert tripled.rows[0].value == pytest.approx(3.0 * plain.rows[0].value, rel=1e-12)


def test_a_nan_of_one_sample_is_seen() -> None:
    x, y = vectors().tensors
    x = x.clone()
    x[order_of(COUNT)[0]] = math.nan
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    monitor = StabilizationMonitor(sample_sizes=(4,), candidates=2, quantities=("delta_1",))
    module = Classifier(mlp(3, 4).double(), lambda m: None)
    assert math.isnan(monitor.evaluate(module, loader, trainer=make_trainer()).values["delta_1"])


def even(module: Any, batch: Any) -> Tensor:
    if len(batch[0]) % 2:
        raise AssertionError  # as an assert statement does, which pytest adds words to
    return F.cross_entropy(module(batch[0]), batch[1])


def halves(module: Any, batch: Any) -> Tensor:
    first, second = module(batch[0]).view(8, -1).chunk(2)
    return F.mse_loss(first, second)


def contrastive(module: Any, batch: Any) -> Tensor:
    first, second = F.normalize(module(batch[0])).chunk(2)
    return F.cross_entropy(first @ second.T, torch.arange(len(first)))


def of_eight(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]).view(8, 4), batch[1])


NOT_ALONE: dict[str, tuple[Callable[[Any, Any], Tensor] | None, str]] = {
    "even": (even, "AssertionError for one"),
    "halves": (halves, "RuntimeError (shape '[8, -1]' is invalid"),
    "pairs": (contrastive, "ValueError (not enough values"),
    "of eight": (of_eight, "RuntimeError (shape '[8, 4]' is invalid"),
    "normalized": (None, "ValueError (Expected more than 1 value per channel"),
}
ALONE: dict[str, Callable[..., Any]] = {
    "stabilization": lambda **o: StabilizationMonitor(sample_sizes=2, candidates=2, subspace_dim=1, **o),
    "kronecker": lambda **o: NoiseCovarianceMonitor(parameter="network.0.weight", **o),
    "general": lambda **o: NoiseCovarianceMonitor(parameter="network.0.bias", **o),
}


@pytest.mark.parametrize("which", ALONE)
@pytest.mark.parametrize("kind", NOT_ALONE)
@pytest.mark.thinned(3)
def test_a_step_that_takes_no_sample_alone_is_told_so(kind: str, which: str) -> None:
    """With the error that it raised and what to do; a step that fails for any batch has its own error alone."""
    step, got = NOT_ALONE[kind]
    module = classifier(*([] if step else [nn.BatchNorm1d(5)]), step=step)
    follow = ALONE[which](at_end=True, probe_mode="eval" if step else "train")
    data = DataLoader(vectors(), batch_size=8, drop_last=True)
    said = [m for m in warned(lambda: make_trainer(follow).fit(module, data)) if "logs NaN" in m]
    assert len(said) == 1
    assert f"training_step must take a batch of one where samples are evaluated one at a time, got {got}" in said[0]
    assert "give objective= the loss of a single sample" in said[0]
    assert ("probe_mode='eval'" in said[0]) == (step is None)

    def broken(module: Any, batch: Any) -> Tensor:
        if not torch.is_grad_enabled():
            raise LookupError("broken")
        return F.cross_entropy(module(batch[0]), batch[1])

    module = classifier(step=broken)
    said = [m for m in warned(lambda: make_trainer(follow).fit(module, data)) if "logs NaN" in m]
    assert said == [f"{type(follow).__name__} logs NaN: LookupError: broken"]
