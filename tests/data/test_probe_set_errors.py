"""Errors of loaders and arguments from which no probe set can be read: one sentence with the remedy."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, IterableDataset

from lightning_curvature.data.probe_set import read_probe_set
from tests.helpers.runs import make_trainer

NUMBERS = list(range(10))
WHOLE = [torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5, 6])]


class Stream(IterableDataset[int]):
    def __init__(self, source: Iterable[int]) -> None:
        self.source = source

    def __iter__(self) -> Iterator[int]:
        return iter(self.source)


@pytest.mark.parametrize(
    ("loader", "options", "sentence"),
    [
        (NUMBERS, {"samples": 0}, r"samples must be at least 1, got 0: give a larger number, or None\."),
        (NUMBERS, {"batch_size": 0}, r"batch_size must be at least 1, got 0: give a larger number, or None\."),
        (
            [],
            {},
            r"the probe set must hold at least one sample for each rank, got 0: give more data, or other data by "
            r"probe_dataloader=\.",
        ),
        (
            {"a": DataLoader(NUMBERS), "b": DataLoader(NUMBERS)},
            {},
            r"the probe set must come from one dataloader, got a dict of 2: give probe_dataloader= batches of the form",
        ),
        ([DataLoader(NUMBERS)] * 3, {}, r"one dataloader, got a list of 3: give probe_dataloader= batches of the form"),
        (None, {}, r"set up its train dataloader .* got None: read in on_train_start or later, or give probe_data"),
        (
            DataLoader(Stream(i for i in range(9)), batch_size=2),
            {},
            r"must be one that can be copied, .* got DataLoader \(TypeError: .*generator.*\): give probe_dataloader= a "
            r"list of batches or a DataLoader over a map-style dataset\.",
        ),
        (
            DataLoader(Stream(itertools.count())),
            {},
            r"samples must be a number where the dataloader has no length, got None: say how many to measure on\.",
        ),
        (
            WHOLE,
            {"batch_size": 2},
            r"batch_size must be left to a dataloader that hands out whole batches, got 2: leave it out\.",
        ),
        (["text"], {}, r"must show how many samples it holds by a tensor in it, got a str without: give probe_data"),
    ],
)
def test_errors_are_one_sentence_with_a_remedy(loader: Any, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises((ValueError, MisconfigurationException), match=sentence) as caught:
        read_probe_set(make_trainer(), loader, **({"samples": None} | options))
    assert str(caught.value).count(". ") == 0
