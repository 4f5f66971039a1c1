"""What a sample's loss is where that of a batch is something else: any step, mode, precision and optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.callbacks.noise_runs import BATCH, assert_matrices, dense, evaluated, informed, module_of, network, samples
from tests.callbacks.test_no_observer_effect import sgd
from tests.oracles.dense import Loss
from tests.runs import Batch, Classifier, mlp

__all__ = ["informed"]  # a fixture


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
