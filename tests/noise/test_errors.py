"""Every mistake gets one sentence, before the first step where it can be known: argument, rule, value, remedy."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_curvature import CurvatureWarning, NoiseCovarianceMonitor
from lightning_curvature.noise import routes as noise_block
from lightning_curvature.noise.options import KEYS, QUANTITIES
from tests.helpers.modules import Plain, sgd, sharded, unending
from tests.helpers.noise import monitor as strict
from tests.helpers.noise import samples
from tests.helpers.runs import Capture, Classifier, make_trainer, rows, warned
from tests.helpers.traps import Stream
from tests.testers.families.noise import NOISE


def monitor(name: str = "network.0.weight", **options: Any) -> NoiseCovarianceMonitor:
    return NoiseCovarianceMonitor(parameter=name, **options)


def data() -> DataLoader[Any]:
    return DataLoader(samples(16), batch_size=8)


@pytest.mark.parametrize("name", [n for n, m in NOISE.misfits.items() if m.sentence.startswith(("parameter", "top"))])
def test_misfits_by_hand(name: str) -> None:
    """Those that are none of a fit."""
    misfit = NOISE.misfits[name]
    with pytest.raises(MisconfigurationException, match=f"^{misfit.sentence}"):
        NOISE.make_few(**misfit.options).evaluate(misfit.module(), misfit.data(), trainer=make_trainer())


def test_a_block_too_large_for_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its size, the limit, and what would fit: ten matrices of 8 bytes a number in 80 % of what is free."""
    monkeypatch.setattr(noise_block, "available_memory", lambda *args: 100 * 20**2)
    sentence = (
        r"^parameter must be a block of at most 20 entries, whose square matrices fit into the 0\.0 GiB that there are "
        r"for them, got 'network\.0\.weight' with 24 \(0\.0 GiB\): choose one of 'network\.2\.weight' \(18\), "
        r"'network\.0\.bias' \(6\), 'network\.2\.bias' \(3\)\.$"
    )
    with pytest.raises(MisconfigurationException, match=sentence):
        make_trainer(monitor()).fit(Plain(), data())
    strict("2.weight").evaluate(Plain(), data(), trainer=make_trainer())
    monkeypatch.setattr(noise_block, "available_memory", lambda *args: 100)
    with pytest.raises(MisconfigurationException, match=r"with 24 \(0\.0 GiB\): choose a smaller one\.$"):
        make_trainer(monitor()).fit(Plain(), data())


def test_shards() -> None:
    sentence = r"^module must have whole parameters for evaluate\(\), got sharded ones: load the checkpoint into a"
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        module = Plain(make_optimizer=sharded)
        with pytest.raises(
            MisconfigurationException, match="sharded by FSDP2's fully_shard alone, for NoiseCovariance"
        ):
            make_trainer(monitor()).fit(module, data())
        with pytest.raises(MisconfigurationException, match=sentence):
            monitor().evaluate(module, data(), trainer=make_trainer())
    finally:
        dist.destroy_process_group()
    assert module.seen == 0


def outcome(module: Any, loader: Any = None, **options: Any) -> tuple[list[str], dict[str, float]]:
    """What was said, and the row of the end."""
    capture, follow = Capture(), monitor(**options)
    trainer = make_trainer(follow, logger=capture)
    said = warned(lambda: trainer.fit(module, loader or data()))
    assert trainer.global_step > 0
    return said, list(rows(capture).values())[-1]


class Diverged(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * torch.nan


@pytest.mark.parametrize("name", ["network.0.weight", "network.0.bias"])
def test_a_loss_that_is_no_number(name: str) -> None:
    (said,), row = outcome(Diverged(), name=name)
    assert said.startswith(
        f"NoiseCovarianceMonitor logs NaN: ValueError: gradients and Hessians by '{name}' must be finite, got others: "
    )
    assert all(math.isnan(value) for value in row.values())


class Unused(Plain):
    """Has a layer for later, and one whose output is detached."""

    def __init__(self) -> None:
        super().__init__()
        self.later, self.cut = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + 0.0 * self.cut(batch[0]).detach().sum()


@pytest.mark.parametrize("name", ["later.weight", "later.bias", "cut.weight", "cut.bias"])
def test_a_parameter_that_the_loss_does_not_use(name: str) -> None:
    (said,), row = outcome(Unused(), name=name)
    assert said == (
        "NoiseCovarianceMonitor logs NaN: ValueError: the loss must depend on the parameter, got one that does not: "
        "choose another parameter."
    )
    assert all(math.isnan(value) for value in row.values())


FEW = r"curvatures and variances must both be positive in at least 3 directions for a power law, got {} of {}: measure"


def l1(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.l1_loss(outputs, F.one_hot(labels, 3).to(outputs.dtype))


@pytest.mark.parametrize("name", ["network.0.weight", "network.0.bias"])
def test_a_loss_without_curvature(name: str) -> None:
    """Without curvature there are no directions; the reasons are given once, in however many measurements."""
    module = Classifier(nn.Sequential(nn.Linear(4, 3)).double(), sgd, l1)
    said, row = outcome(module, name=name, every_n_train_steps=1)
    top = 5 if name.endswith("weight") else 3
    assert said == [
        f"noise_gamma, noise_gamma_awd are NaN: {FEW.format(0, top)} on more samples, or later in training, when "
        "curvature is positive.",
        "noise_commutativity, noise_commutativity_relative, noise_alignment, noise_spearman, noise_coupling are NaN: "
        "the Hessian is zero: the loss is linear in the parameter, or piecewise so, or constant for a sample alone, as "
        "one that compares samples is.",
    ]
    assert all(math.isnan(value) for value in row.values())


@pytest.mark.parametrize("name", ["network.0.weight", "network.0.bias"])
@pytest.mark.parametrize("count", [1, 9])
def test_samples_that_are_all_alike(count: int, name: str) -> None:
    """Rounding is no noise: what is left of C is not fitted."""
    x, y = (t[:1] for t in samples().tensors)
    same = TensorDataset(x.expand(count, -1).clone(), y.expand(count).clone())
    said, row = outcome(Plain(), DataLoader(same, batch_size=4), name=name)
    assert any("the gradients of all samples are alike: there is no noise, but for rounding." in text for text in said)
    for key in ("noise_gamma", "noise_commutativity", "noise_alignment", "noise_spearman", "noise_coupling"):
        assert math.isnan(row[key]), key


def test_classes_with_a_single_sample() -> None:
    """Those are left out, with their share; where none has a partner there is no chain."""
    quantities = QUANTITIES[-1:]
    x, _ = samples(12).tensors
    y = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 2])
    said, row = outcome(Plain(), DataLoader(TensorDataset(x, y), batch_size=6), quantities=quantities)
    assert said == [
        "samples must have a partner of their class in the other half of their batch, got 8.3% without, which "
        "'noise_awd_chain' leaves out: raise micro_batch_size."
    ]
    assert all(math.isfinite(value) for value in row.values())
    alone = DataLoader(TensorDataset(x[:3], torch.arange(3)), batch_size=6)
    said, row = outcome(Plain(), alone, quantities=quantities)
    assert said[0] == (
        "noise_awd_chain is NaN: no sample has a partner of its class in the other half of its batch: give larger "
        "micro-batches, or fewer classes."
    )
    assert all(math.isnan(value) for value in row.values())


def test_a_chain_that_does_not_exist() -> None:
    said, row = outcome(Plain(), name="network.0.bias", quantities=QUANTITIES)
    assert (
        "noise_awd_chain is NaN: it exists for the weight of a linear layer that is used once for each sample." in said
    )
    assert math.isnan(row["noise_gamma_awd_raw"])


class Named(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step((batch["x"], batch["y"]), batch_idx)


class Regression(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self.network(batch[0])[:, 0], batch[1])


@pytest.mark.parametrize("labels", ["dict", "numbers"])
def test_batches_without_labels_to_pair_by(labels: str) -> None:
    """All else is there."""
    x, y = samples(16).tensors
    named = DataLoader([{"x": a, "y": b} for a, b in zip(x, y, strict=True)], batch_size=8)  # type: ignore[arg-type]
    module, loader, kind = Named(), named, "a dict"
    if labels == "numbers":
        kind = "targets of torch.float64 and shape (16,)"
        module, loader = Regression(), DataLoader(TensorDataset(x, y.double()), batch_size=8)
    sentence = (
        f"batches must be pairs of inputs and class labels for 'noise_awd_chain', got {kind}: give pairing= a callable "
        "batch → (inputs, labels), or leave the quantity out."
    )
    with pytest.warns(CurvatureWarning) as caught:
        result = monitor(quantities=QUANTITIES).evaluate(module, loader, trainer=make_trainer()).result
    assert str(caught[-1].message) == f"noise_awd_chain is NaN: {sentence}"
    values = result.values(QUANTITIES)
    assert {key for key, value in values.items() if math.isnan(value)} == set(KEYS["noise_awd_chain"])


def test_with_a_pairing_of_its_own() -> None:
    x, y = samples(16).tensors
    named = DataLoader([{"x": a, "y": b} for a, b in zip(x, y, strict=True)], batch_size=8)  # type: ignore[arg-type]
    strict("0.weight", quantities=QUANTITIES, pairing=lambda batch: (batch["x"], batch["y"])).evaluate(
        Named(), named, trainer=make_trainer()
    )


@pytest.mark.parametrize("stream", [lambda: DataLoader(Stream(), batch_size=8), unending])
def test_streams(stream: Any) -> None:
    follow = strict("0.weight", probe_dataloader=stream(), probe_samples=24)
    make_trainer(follow).fit(Plain(), data())
    assert follow.result is not None
    assert follow.result.samples == 24
