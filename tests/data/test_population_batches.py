"""Mini-batches of whole batches of a loader, and the errors of populations: one sentence each."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from lightning_curvature.data.population import read_population
from tests.helpers.population import assert_frequencies, given, numbers, populate
from tests.helpers.probe_sets import NUMBERS, WHOLE, Doubled, Endless, Growing, Stream
from tests.helpers.runs import make_trainer

ACCUMULATION = {"accumulate_grad_batches": 2}


@pytest.mark.parametrize(
    ("loader", "options", "batch_size", "drawn"),
    [
        (DataLoader(WHOLE, batch_size=None), {}, None, [[0, 1, 2], [3, 4, 5, 6], [7], [8, 9]]),
        (DataLoader(WHOLE, batch_size=None), {"samples": 5}, None, [[0, 1, 2], [3, 4, 5, 6]]),
        (DataLoader(NUMBERS, batch_sampler=Growing()), {}, None, [[0], [1, 2], [3, 4, 5], [6, 7, 8, 9]]),
        (Doubled(NUMBERS[:8], batch_size=4), {}, None, [[0, 2, 4, 6], [8, 10, 12, 14]]),
        (DataLoader(Stream(), batch_size=2), {"samples": 7}, 4, [[0, 1], [2, 3], [4, 5], [6, 7]]),
        # Without the incomplete batch.
        (DataLoader(Stream(5), batch_size=2), {"samples": 9}, 4, [[0, 1], [2, 3]]),
        # Cut into divisors of a mini-batch.
        (DataLoader(Stream(12), batch_size=6), {"samples": 12, "micro_batch_size": 4, "batch_size": 6}, 6,
         [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]),
        (DataLoader(Stream(12), batch_size=3), {"samples": 12, "batch_size": 4}, 4,
         [[i, i + 1] for i in range(0, 12, 2)]),
        (DataLoader(NUMBERS, batch_size=2, sampler=Endless()), {"samples": 3}, 4, [[5, 2], [5, 2]]),
    ],
    ids=["whole", "whole, some", "batch sampler", "loader class", "endless", "incomplete", "micro", "size", "sampler"],
)  # fmt: skip
def test_a_mini_batch_is_as_many_batches_as_make_up_a_step(
    loader: Any, options: dict[str, Any], batch_size: int | None, drawn: list[list[int]]
) -> None:
    population = populate(loader, ACCUMULATION, **options)
    assert (population.batch_size, population.replacement) == (batch_size, False)
    whole = population.whole()
    places = {id(part.batch): place for place, part in enumerate(whole.batches)}
    assert [part.batch.tolist() for part in whole.batches] == drawn
    assert population.total == sum(map(len, drawn))
    # Batches of any sizes have equal weight, as in the steps of training.
    assert [part.size for part in whole.batches] == [1] * len(drawn)
    assert whole.total == len(drawn)
    found = set()
    for number in range(100):
        parts = population.draw(0, number)
        chosen = [places[id(part.batch)] for part in parts]
        assert len(set(chosen)) == len(chosen) == 2
        assert [part.size for part in parts] == [1, 1]
        found |= set(chosen)
    # Each of at most six is missing with probability at most (1 − 2/6)^100.
    assert found == set(range(len(drawn)))


def test_all_pairs_of_batches_are_drawn_equally_often() -> None:
    population = populate(DataLoader(WHOLE, batch_size=None), ACCUMULATION)
    pairs = list(itertools.permutations([0, 3, 7, 8], 2))
    # Batches by their first number.
    drawn = [tuple(int(part.batch[0]) for part in population.draw(2, number)) for number in range(1200)]
    assert_frequencies([drawn.count(pair) for pair in pairs], [1 / 12] * 12)


def test_a_draw_of_batches_follows_from_seed_key_and_number_alone() -> None:
    first, again, other = (given(WHOLE, seed=seed) for seed in (0, 0, 1))
    places = list(itertools.product(range(4), range(8)))
    drawn = {place: first.draw(*place) for place in places}
    for place in reversed(places):
        assert [(part.seed, part.batch.tolist()) for part in again.draw(*place)] == [
            (part.seed, part.batch.tolist()) for part in drawn[place]
        ]
    seeds = [part.seed for population in (first, other) for place in places for part in population.draw(*place)]
    seeds += [part.seed for part in first.whole().batches]
    assert len(set(seeds)) == len(seeds) == 2 * 32 + 4
    chosen = [[tuple(numbers(population.draw(*place))) for place in places] for population in (first, other)]
    assert chosen[0] != chosen[1]


def test_a_single_incomplete_batch_is_better_than_nothing() -> None:
    population = given(DataLoader(Stream(3), batch_size=4), samples=3)
    assert numbers(population.draw(0, 0)) == [0, 1, 2]
    assert population.batch_size is None


@pytest.mark.parametrize(
    ("loader", "options", "sentence"),
    [
        (NUMBERS, {"samples": 0}, r"samples must be at least 1, got 0: give a larger number, or None\."),
        (NUMBERS, {"batch_size": 0}, r"batch_size must be at least 1, got 0: give a larger number, or None\."),
        (NUMBERS, {"micro_batch_size": 0}, r"micro_batch_size must be at least 1, got 0: give a larger number, or N"),
        (
            DataLoader(NUMBERS, batch_size=4),
            {"batch_size": 11},
            r"batch_size must be at most the 10 samples that are drawn from without replacement, got 11: lower it, or "
            r"raise probe_samples\.",
        ),
        (
            DataLoader(NUMBERS, batch_size=4),
            {"samples": 3},
            r"at most the 3 samples .*, got 4 \(an optimizer step\): lower it, or raise prob",
        ),
        (DataLoader([], batch_size=4), {"batch_size": 2}, r"at least one sample for each rank, got 0: give more data"),
        ([], {}, r"at least one sample for each rank, got 0: give more data, or other data by probe_dataloader=\."),
        (WHOLE, {"batch_size": 2}, r"^batch_size must be left to a dataloader that hands out whole batches, got 2: le"),
        (WHOLE, {"micro_batch_size": 2}, r"^micro_batch_size must be left to a dataloader .* whole batches, got 2: le"),
        (
            DataLoader(Stream(5), batch_size=2),
            {"batch_size": 6, "samples": 9},
            r"each rank must hold at least the 3 batches that make up a mini-batch, got 2: raise probe_samples, or "
            r"give batches of the size of a mini-batch by probe_dataloader=\.",
        ),
        (DataLoader(Stream(), batch_size=2), {}, r"samples must be a number where the dataloader has no length, got N"),
    ],
)
def test_errors_are_one_sentence_with_a_remedy(loader: Any, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises((ValueError, MisconfigurationException), match=sentence) as caught:
        read_population(make_trainer(), loader, **({"samples": None} | options))
    assert str(caught.value).count(". ") == 0


def test_batches_do_not_share_memory_with_the_loader() -> None:
    data = [torch.ones(2) * i for i in range(3)]
    population = given(data)
    held = {part.batch.data_ptr() for number in range(9) for part in population.draw(0, number)}
    assert held == {part.batch.data_ptr() for part in population.whole().batches}
    assert not held & {one.data_ptr() for one in data}
