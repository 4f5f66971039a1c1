"""The block is found under its name, and by the name of the original that pruning or a parametrization moves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.data import DataLoader

from tests.helpers.changes import AT, At, Shrunk
from tests.helpers.noise import BATCH, assert_matrices, dense, module_of, monitor, network, samples
from tests.helpers.runs import make_trainer, warned


def assert_found(module: Any, name: str, full: str) -> None:
    found = (
        monitor(name, top=20).evaluate(module, DataLoader(samples(), batch_size=BATCH), trainer=make_trainer()).result
    )
    assert_matrices(found, dense(module, full), BATCH)


def pruned(layer: nn.Module) -> str:
    prune.l1_unstructured(layer, "weight", 0.4)
    with torch.no_grad():  # leaves a weight without a graph, which the oracle can copy
        layer(torch.zeros(1, 4).double())
    return "0.weight_orig"


def parametrized(layer: nn.Module) -> str:
    parametrize.register_parametrization(layer, "weight", Shrunk())
    return "0.parametrizations.weight.original"


@pytest.mark.parametrize("change", [pruned, parametrized])
def test_original_in_the_place_of_a_weight(change: Any) -> None:
    module = module_of(network())
    full = change(module.network[0])
    for name in ("0.weight", full):
        assert_found(module, name, full)


@pytest.mark.parametrize("name", ["0.weight_orig", "0.parametrizations.weight.original"])
def test_original_that_is_the_weight_again(name: str) -> None:
    """A run that ends with ``prune.remove`` or ``remove_parametrizations`` is measured to its end."""
    assert_found(module_of(network()), name, "0.weight")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda _, network: parametrizations.weight_norm(network[0], "weight"),
            "parameter must be a name out of named_parameters(), got 'network.0.weight': the nearest are",
        ),
        (
            lambda _, network: network[0].requires_grad_(False),
            "parameter must require gradients, got the frozen 'network.0.weight': unfreeze it or choose another.",
        ),
    ],
)
def test_weight_that_ends_within_a_run(change: Any, sentence: str) -> None:
    """Under weight_norm there are two parameters in its place; the run goes on."""
    follow = monitor("0.weight", every_n_train_steps=2, at_end=False, on_error="warn")
    trainer = make_trainer(At(AT, change), follow, max_epochs=2)
    (said,) = warned(lambda: trainer.fit(module_of(network()), DataLoader(samples(16), batch_size=BATCH)))
    assert said.startswith(f"NoiseCovarianceMonitor logs NaN: RuntimeError: {sentence}")
    assert trainer.global_step == 4
