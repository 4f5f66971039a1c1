"""Samples of a probe set, from all kinds of loaders on one process."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_curvature.data.probe_set import ProbeSet, read_probe_set
from lightning_curvature.data.reading import sample_count
from tests.helpers.probe_sets import NUMBERS, WHOLE, Doubled, Endless, Growing, Odd, Plain, Stream
from tests.helpers.runs import make_trainer


class Reader(pl.Callback):
    """Reads the probe set before one training batch."""

    def __init__(self, at: int = 0, **options: Any) -> None:
        self.at = at
        self.options = {"samples": None} | options
        self.probes: ProbeSet | None = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.at:
            self.probes = read_probe_set(trainer, **self.options)


def read(loader: Any, trainer_options: dict[str, Any] | None = None, **options: Any) -> ProbeSet:
    reader = Reader(**options)
    make_trainer(reader, max_steps=1, **(trainer_options or {})).fit(Plain(), loader)
    assert reader.probes is not None
    return reader.probes


def values(probes: ProbeSet) -> list[list[int]]:
    assert [probe.size for probe in probes.batches] == [len(probe.batch) for probe in probes.batches]
    assert probes.total == sum(probe.size for probe in probes.batches)
    assert probes.rounds == len(probes.batches)
    return [probe.batch.tolist() for probe in probes.batches]


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(NUMBERS, batch_size=4),
        DataLoader(NUMBERS, batch_size=4, shuffle=True),
        DataLoader(NUMBERS, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(3)),
        DataLoader(NUMBERS, batch_size=4, sampler=RandomSampler(NUMBERS, replacement=True, num_samples=20)),
        DataLoader(NUMBERS, batch_sampler=BatchSampler(RandomSampler(NUMBERS), 4, drop_last=False)),
    ],
    ids=["in order", "shuffled", "generator", "with replacement", "batch sampler"],
)
def test_all_samples_once_in_batches_of_the_loader(loader: Any) -> None:
    assert values(read(loader, samples=10)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_a_ragged_batch_that_training_never_sees_is_left_out() -> None:
    loader = DataLoader(NUMBERS, batch_size=4, shuffle=True, drop_last=True)
    assert values(read(loader, samples=10)) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    # A single incomplete batch is kept.
    assert len(values(read(loader, samples=3, batch_size=4))[0]) == 3


def test_batches_of_the_size_that_is_given() -> None:
    assert values(read(DataLoader(NUMBERS, batch_size=4), batch_size=6)) == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9]]
    stream = DataLoader(Stream(7), batch_size=2)
    assert values(read(stream, batch_size=3, samples=9)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert values(read(stream, {"limit_train_batches": 3}, batch_size=1)) == [[i] for i in range(6)]


def test_a_part_of_the_samples_is_drawn_by_seed() -> None:
    loader = DataLoader(NUMBERS, batch_size=4, shuffle=True)
    trainer = make_trainer()

    def drawn(seed: int) -> list[int]:
        probes = read_probe_set(trainer, loader, samples=6, seed=seed)
        assert [probe.size for probe in probes.batches] == [4, 2]
        return [*itertools.chain(*values(probes))]

    sets = [drawn(seed) for seed in range(200)]
    assert all(len(set(one)) == 6 and one == sorted(one) for one in sets)
    assert sets[:5] == [drawn(seed) for seed in range(5)]
    # Each sample is in a set with probability 0.6: 120 of 200 with standard deviation 7; five of them.
    counts = torch.bincount(torch.tensor(sets).flatten(), minlength=10)
    assert (counts - 120).abs().max() < 35


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        (SubsetRandomSampler([8, 1, 6]), [[1, 6], [8]]),
        (WeightedRandomSampler([0.0, 0.5, 0.0, 0.1, 9.0], num_samples=50), [[1, 3], [4]]),
        (Odd(), [[1, 3], [7, 9]]),
    ],
    ids=["subset", "weighted", "of the user"],
)
def test_only_samples_that_the_sampler_gives(sampler: Any, expected: list[list[int]]) -> None:
    assert values(read(DataLoader(NUMBERS, batch_size=2, sampler=sampler), samples=8)) == expected


def test_sampler_without_an_end() -> None:
    assert values(read(DataLoader(NUMBERS, batch_size=2, sampler=Endless()), samples=3)) == [[5, 2], [5, 2]]


@pytest.mark.parametrize(
    ("loader", "options", "expected"),
    [
        (DataLoader(NUMBERS, batch_size=2), {"limit_train_batches": 2}, [[0, 1], [2, 3]]),
        (DataLoader(NUMBERS, batch_size=4, drop_last=True), {}, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (DataLoader(NUMBERS, batch_size=5, shuffle=True), {"limit_train_batches": 1}, [NUMBERS[:5], NUMBERS[5:]]),
        (DataLoader(NUMBERS, batch_size=2, shuffle=True), {"overfit_batches": 2}, [[0, 1], [2, 3]]),
        (DataLoader(WHOLE, batch_size=None), {"overfit_batches": 2}, [[0, 1, 2], [3, 4, 5, 6]]),
        (DataLoader(NUMBERS, batch_sampler=Growing()), {"overfit_batches": 2}, [[0], [1, 2]]),
        (DataLoader(Stream(), batch_size=2), {"limit_train_batches": 3}, [[0, 1], [2, 3], [4, 5]]),
    ],
    ids=[
        "limit",
        "drop last",
        "limit of shuffled",
        "overfit",
        "overfit whole batches",
        "overfit batch sampler",
        "limit of endless",
    ],
)
@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_no_samples_that_training_never_sees(loader: Any, options: dict[str, Any], expected: list[list[int]]) -> None:
    assert values(read(loader, options)) == expected


@pytest.mark.parametrize(
    ("loader", "expected"),
    [
        (DataLoader(WHOLE, batch_size=None), [[0, 1, 2], [3, 4, 5, 6]]),
        (DataLoader(NUMBERS, batch_sampler=Growing()), [[0], [1, 2], [3, 4, 5]]),
        (DataLoader(Stream(9), batch_size=2), [[0, 1], [2, 3], [4, 5]]),
        (DataLoader(Stream(), batch_size=4), [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (Doubled(NUMBERS, batch_size=4), [[0, 2, 4, 6], [8, 10, 12, 14]]),
    ],
    ids=["whole batches", "batch sampler", "iterable", "endless", "loader class"],
)
def test_other_loaders_in_their_order_until_there_are_enough(loader: Any, expected: list[list[int]]) -> None:
    assert values(read(loader, samples=5)) == expected


def test_given_batches_instead_of_the_loader() -> None:
    loader = DataLoader(NUMBERS, batch_size=4)
    assert values(read(loader, dataloader=WHOLE)) == [batch.tolist() for batch in WHOLE]
    assert values(read(loader, {"limit_train_batches": 1}, dataloader=loader)) == [NUMBERS[:4], NUMBERS[4:8], [8, 9]]


def test_dicts_and_the_form_of_a_single_combined_loader() -> None:
    data = [{"x": torch.full((3,), float(i)), "name": str(i)} for i in range(3)]
    probes = read({"only": DataLoader(data, batch_size=2)})
    first, second = (probe.batch["only"] for probe in probes.batches)
    assert torch.equal(first["x"], torch.tensor([[0.0] * 3, [1.0] * 3]))
    assert second["name"] == ["2"]
    assert (probes.total, [probe.size for probe in probes.batches]) == (3, [2, 1])
    combined = CombinedLoader([DataLoader(NUMBERS, batch_size=10)], "min_size")
    (probe,) = read(combined).batches
    assert [part.tolist() for part in probe.batch] == [NUMBERS]


def test_a_batch_of_several_sizes_counts_its_first_and_leaves_the_warning_to_the_run() -> None:
    batches = [(torch.zeros(3), torch.zeros(2))] * 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        probes = read_probe_set(make_trainer(), batches, samples=None)
    assert [probe.size for probe in probes.batches] == [3, 3]
    with pytest.warns(UserWarning, match="ambiguous collection"):
        assert extract_batch_size(batches[0]) == 3


def test_the_epoch_of_a_sampler_neither_matters_nor_moves() -> None:
    def drawn(epoch: int) -> list[list[int]]:
        sampler = DistributedSampler(WHOLE, num_replicas=1, rank=0, shuffle=True)  # type: ignore[arg-type]
        sampler.set_epoch(epoch)
        found = values(
            read_probe_set(make_trainer(), DataLoader(WHOLE, batch_size=None, sampler=sampler), samples=None)
        )
        assert sampler.epoch == epoch
        assert sorted(found) == sorted(batch.tolist() for batch in WHOLE)
        return found

    assert drawn(0) == drawn(3) == drawn(5)


class Molecules:
    """Graphs in one batch, as PyTorch Geometric makes it."""

    def __init__(self, graphs: list[Tensor]) -> None:
        self.x, self.num_graphs = torch.cat(graphs), len(graphs)

    def to_data_list(self) -> list[Tensor]:
        raise AssertionError("nothing is to be cut")


def test_graphs_count_and_not_their_nodes() -> None:
    assert sample_count(Molecules([torch.ones(5, 2), torch.ones(7, 2)])) == 2
    assert sample_count((torch.ones(4, 2), torch.ones(4))) == 4
