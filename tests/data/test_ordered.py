"""Single samples in a fixed order: nested sets, on any number of ranks, from all loaders that cut batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from lightning_curvature.data.ordered import OrderedSamples, first_of_shuffle, read_ordered_samples
from tests.helpers.reading_ranks import WHOLE, Noisy, Sharded, read_all


def order(ranks: int, samples: int, make: Any = lambda rank: DataLoader(Noisy(), 4), **options: Any) -> list[Any]:
    """Return the samples of all ranks in their order; each lies on the rank of its number modulo ``ranks``."""
    shares: list[OrderedSamples] = read_all(ranks, make, reader=read_ordered_samples, samples=samples, **options)
    for rank, share in enumerate(shares):
        assert share.total == samples
        assert list(share.own) == share.among(range(samples)) == list(range(rank, samples, ranks))
        assert all(one.size == len(one.batch) == 1 for one in share.own.values())
    every = {number: one for share in shares for number, one in share.own.items()}
    return [(every[number].seed, every[number].batch.tolist()) for number in range(samples)]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_nested_on_any_number_of_ranks(ranks: int) -> None:
    # Samples, their augmentation, and the seeds of the hooks.
    whole = order(1, 11)
    for samples in (ranks, 4, 11):
        assert order(ranks, samples) == whole[:samples]
    assert {int(batch[0][0]) for _, batch in whole} == set(range(11))
    assert order(ranks, 11, seed=1) != whole


def test_samples_of_an_iterable_dataset_come_from_the_ranks_in_turn() -> None:
    samples = order(2, 5, lambda rank: DataLoader(Sharded(rank), batch_size=3))
    assert [batch for _, batch in samples] == [[0], [20], [1], [21], [2]]


@pytest.mark.parametrize(
    ("loader", "samples", "sentence"),
    [
        (
            WHOLE,
            2,
            r"make batches of single samples, got a list that hands out whole ones: give probe_dataloader= one ",
        ),
        (DataLoader(WHOLE, batch_size=None), 2, r"got a DataLoader that hands out whole ones: .* with a batch_size\."),
        (DataLoader(Noisy(), 4), 12, r"leave a sample to be added, got 12 samples .* where the data has 11: lower sam"),
    ],
)
def test_errors_are_one_sentence_with_a_remedy(loader: Any, samples: int, sentence: str) -> None:
    (error,) = read_all(1, lambda rank: loader, True, reader=read_ordered_samples, samples=samples)
    with pytest.raises(MisconfigurationException, match=sentence):
        raise error
    assert str(error).count(". ") == 0


def test_the_first_numbers_of_a_shuffle_are_equally_often_each_number() -> None:
    drawn = torch.tensor([first_of_shuffle(5, 3, seed) for seed in range(2000)])
    assert all(len(set(row)) == 3 for row in drawn.tolist())
    # Each number stands at each place with probability 0.2: 400 of 2000 with standard deviation 18; five of them.
    for place in drawn.T:
        assert (torch.bincount(place, minlength=5) - 400).abs().max() < 90
