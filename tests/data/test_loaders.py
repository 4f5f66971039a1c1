"""One rule for what a probe set is read from, before anything is read."""

from __future__ import annotations

import itertools
from collections import UserDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, IterableDataset, Subset

from lightning_curvature.data.loaders import check_dataloader
from tests.helpers.runs import batched_samples
from tests.testers.arguments import assert_one_sentence

LOADER = batched_samples()
DATASET, BATCHES = LOADER.dataset, list(LOADER)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(BATCHES)


class Own:
    """Begins anew whenever it is iterated, as some libraries' loaders do."""

    def __iter__(self) -> Own:
        self.rest = iter(BATCHES)
        return self

    def __next__(self) -> Any:
        return next(self.rest)


class Table(list[Any]):
    """A data set of another library, by the method that torch's loaders look for."""

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[index] for index in indices]


@pytest.mark.parametrize(
    "value",
    [
        *(
            None,
            LOADER,
            DataLoader(Stream(), batch_size=None),
            BATCHES,
            tuple(BATCHES),
            [x for x, _ in BATCHES],
            [],
            Own(),
        ),
        *(
            [LOADER],
            {"a": LOADER},
            CombinedLoader(LOADER),
            CombinedLoader({"a": LOADER}),
            {"a": BATCHES[0][0]}.values(),
        ),
        *([{"x": torch.zeros(3), "step": 2}], [(torch.zeros(3, 2), torch.zeros(3), 0.5)]),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_can_be_read(value: Any) -> None:
    check_dataloader("probe_dataloader", value)


@pytest.mark.parametrize(
    ("value", "got", "remedy"),
    [
        (DATASET, "a TensorDataset", "wrap it, DataLoader(dataset, batch_size=…)"),
        (Subset(DATASET, [0]), "a Subset", "wrap it"),
        (Stream(), "a Stream", "wrap it"),
        (Table(BATCHES), "a Table", "wrap it"),
        ([DATASET[0], DATASET[1]], "a list of single samples", "wrap it, DataLoader(samples, batch_size=…)"),
        ([(torch.zeros(2), 1)], "a list of single samples", "wrap it"),
        ([LOADER, LOADER], "a list of 2 dataloaders", "give one of them, or a list of batches of the form"),
        ({"a": LOADER, "b": LOADER}, "a dict of 2 dataloaders", "give one of them"),
        (CombinedLoader([LOADER, LOADER]), "a CombinedLoader of 2 dataloaders", "give one of them"),
        ((batch for batch in BATCHES), "a generator, which can be read once", "give a DataLoader, or the list of its"),
        (iter(LOADER), "a _SingleProcessDataLoaderIter, which can be read once", "give a DataLoader"),
        (map(tuple, BATCHES), "a map, which can be read once", "give a DataLoader"),
        (itertools.chain(BATCHES), "a chain, which can be read once", "give a DataLoader"),
        *((value, f"a {type(value).__name__}", "give a DataLoader, or a list of batches")
          for value in ("train", Path("data"), 8, BATCHES[0][0], {"x": BATCHES[0][0]}, UserDict(x=1), {1}, DataLoader,
                        lambda: LOADER, pl.LightningDataModule())),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)  # fmt: skip
def test_what_cannot(value: Any, got: str, remedy: str) -> None:
    sentence = f"probe_dataloader must be one dataloader, or batches that can be read repeatedly, got {got}: {remedy}"
    for error in (ValueError, MisconfigurationException):
        with pytest.raises(error) as caught:
            check_dataloader("probe_dataloader", value, error)
        assert str(caught.value).startswith(sentence)
        assert_one_sentence(caught.value)
