"""What a sample's loss is where that of a batch is something else: any step, mode, precision and optimizer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers.manual import Manual
from tests.helpers.noise import (
    BATCH,
    assert_matrices,
    dense,
    evaluated,
    images,
    module_of,
    monitor,
    network,
    samples,
    squared,
)
from tests.helpers.runs import Batch, Classifier, make_trainer, mlp
from tests.helpers.setups import sgd
from tests.oracles.dense import Loss


class Reading(Classifier):
    """Reads a value in its step."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        assert loss.item() > 0.0
        return loss


def branching(outputs: Tensor, labels: Tensor) -> Tensor:
    """Of a sample, by its own outputs; of a batch, by those of all."""
    return F.cross_entropy(outputs if float(outputs.mean()) > 0.0 else 2.0 * outputs, labels)


def summed(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs, labels, reduction="sum")


def weighted(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs, labels, weight=torch.tensor([1.0, 2.0, 5.0], dtype=outputs.dtype))


NO_MEAN = "the loss of a batch is not the mean of those of its samples"
ONE_BY_ONE = "one by one, which is slow: torch.vmap cannot follow the step"


@pytest.mark.parametrize("name", ["0.weight", "0.bias"])
@pytest.mark.parametrize(
    ("loss", "kind", "said"),
    [
        (F.cross_entropy, Reading, (ONE_BY_ONE,)),
        (branching, Classifier, (ONE_BY_ONE, NO_MEAN)),
        (summed, Classifier, ("at once", NO_MEAN)),
        (weighted, Classifier, ("at once", NO_MEAN)),
    ],
)
@pytest.mark.thinned(3)
def test_any_step(loss: Loss, kind: Any, said: tuple[str, ...], name: str, informed: Callable[[], list[str]]) -> None:
    """A sample's loss is that of a batch of one, whatever that of a batch is."""
    module = kind(mlp(4, 5, 3), sgd, loss)
    found = evaluated(module, name, on_error="warn")
    assert_matrices(found, dense(module, name), BATCH)
    # A linear layer needs its samples one by one to be compared alone.
    assert found.route == ("kronecker" if kind is Reading and name == "0.weight" else "general")
    (told,) = informed()
    if found.route == "general":
        assert [part for part in said if part not in told] == (
            [NO_MEAN] if name == "0.bias" and NO_MEAN in said else []
        )


def test_a_later_batch_may_be_no_mean(informed: Callable[[], list[str]]) -> None:
    """Class weights do not show where all samples are of one class, as in sorted data."""
    x, y = samples(24).tensors
    data = TensorDataset(*(t[y.argsort()] for t in (x, y)))
    assert data.tensors[1][:4].unique().numel() == 1
    module = module_of(network(), weighted)
    found = evaluated(module, "0.weight", DataLoader(data, batch_size=4))
    assert_matrices(found, dense(module, "0.weight", data), 4)
    first, second = informed()
    assert "Kronecker route" in first
    assert second.endswith(f"general route, samples at once; {NO_MEAN}.")


class Padded(Classifier):
    """A mean over the tokens of a batch that are not padding."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        outputs, labels = self(batch[0]), batch[1]
        return F.cross_entropy(outputs.flatten(0, 1), labels.flatten(), ignore_index=0)


def test_padded_tokens() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 7)).double()
    x = torch.randint(1, 7, (10, 4))
    x[::2, 2:] = 0
    module = Padded(layers, sgd)
    data = TensorDataset(x, x)
    loss = lambda outputs, labels: F.cross_entropy(outputs.flatten(0, 1), labels.flatten(), ignore_index=0)  # noqa: E731
    reference = Classifier(layers, module.make_optimizer, loss)
    for name in ("1.weight", "0.weight"):
        found = evaluated(module, name, DataLoader(data, batch_size=4))
        assert found.route == "general"
        expected = dense(reference, name, data)
        assert_matrices(found, expected, 4)


def with_batch_norm() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(27, 3)]
    network = nn.Sequential(*layers).double()
    network(torch.randn(20, 1, 5, 5, dtype=torch.float64))  # statistics of their own
    return network


@pytest.mark.parametrize("name", ["0.weight", "1.weight", "5.weight"])
def test_modules_in_eval_mode(name: str) -> None:
    """By running statistics and without masks, whatever the mode that training is in."""
    network = with_batch_norm()
    module = module_of(network)
    expected = dense(module_of(copy.deepcopy(network).eval()), name, images())
    found = evaluated(module, name, images())
    assert_matrices(found, expected, BATCH)
    assert found.route == ("kronecker" if name == "5.weight" else "general")
    assert network.training


@pytest.mark.parametrize("name", ["0.weight", "5.weight"])
def test_modules_in_training_mode(name: str) -> None:
    """A sample alone is normalized by its own statistics: its loss is that of a batch of one, and a batch no mean."""
    network = with_batch_norm()
    network[3].p = 0.0
    expected = dense(module_of(copy.deepcopy(network)), name, images())
    found = evaluated(module_of(network), name, images(), probe_mode="train")
    assert_matrices(found, expected, BATCH)
    assert found.route == "general"
    # With masks: of samples, the same in each measurement.
    network[3].p = 0.3
    one, other = (evaluated(module_of(network), name, images(), probe_mode="train") for _ in range(2))
    assert one.variances.equal(other.variances)
    assert not torch.allclose(one.variances, found.variances, rtol=1e-3)


class Game(Classifier):
    """Two optimizers, each with a loss of its own, stepped by hand."""

    def __init__(self) -> None:
        super().__init__(mlp(4, 5, 3), sgd)
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [sgd(self.network[0]), sgd(self.network[2])]

    def player_loss(self, player: int, batch: Batch) -> Tensor:
        outputs = self(batch[0])
        return F.cross_entropy(outputs, batch[1]) if player == 0 else squared(outputs, batch[1])

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
        for player, optimizer in enumerate(self.optimizers()):  # type: ignore[arg-type]
            optimizer.zero_grad()
            self.manual_backward(self.player_loss(player, batch))
            optimizer.step()


@pytest.mark.parametrize("player", [0, 1])
@pytest.mark.parametrize("name", ["0.weight", "2.weight", "2.bias"])
def test_several_optimizers(name: str, player: int) -> None:
    """The loss is that of the objective, of any parameter of the module."""
    objective = lambda module, batch: module.player_loss(player, batch)  # noqa: E731
    module, follow = Game(), monitor(name, objective=objective, optimizer_index=player, top=None)
    make_trainer(follow).fit(module, DataLoader(samples(), batch_size=BATCH))
    size = module.network.get_parameter(name).numel()
    by_hand = evaluated(module, name, objective=objective, top=size)
    module.loss = F.cross_entropy if player == 0 else squared
    assert_matrices(by_hand, dense(module, name), BATCH)
    assert follow.result is not None
    assert by_hand.curvatures[: len(follow.result.curvatures)].equal(follow.result.curvatures)


def test_manual_optimization() -> None:
    """The loss is what the step hands to ``manual_backward``."""
    module, follow = Manual(mlp(4, 5, 3), sgd), monitor("0.weight")
    make_trainer(follow).fit(module, DataLoader(samples(), batch_size=BATCH))
    found = evaluated(module, "0.weight")
    assert_matrices(found, dense(module, "0.weight"), BATCH)
    assert follow.result is not None
    assert found.curvatures[: len(follow.result.curvatures)].equal(follow.result.curvatures)


@pytest.mark.parametrize("name", ["0.weight", "0.bias"])
def test_in_single_precision(name: str) -> None:
    """Sums are in double precision: what is left is the rounding of each sample's own derivatives."""
    module = module_of(network())
    expected = dense(module, name)
    module.float()
    data = TensorDataset(samples().tensors[0].float(), samples().tensors[1])
    loader = DataLoader(data, batch_size=BATCH)
    size = expected.gradients.shape[1]
    result = monitor(name, top=size).evaluate(module, loader, trainer=make_trainer(precision="32-true")).result
    # A few roundings of 6e-8, of C, whose terms are squares of them, twice as many.
    assert_matrices(result, expected, BATCH, tolerance=2e-6)
