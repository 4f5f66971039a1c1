"""Mini-batches drawn from the samples of a map-style dataset: their samples, sizes and probabilities."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from lightning_curvature.data.population import read_population
from lightning_curvature.data.probe_set import read_probe_set
from tests.helpers.population import assert_frequencies, assert_same, given, numbers, populate
from tests.helpers.probe_sets import NUMBERS, Odd
from tests.helpers.reading_states import LOADERS
from tests.helpers.runs import make_trainer

# Loaders with indices.
BY_INDEX = ["in order", "shuffled", "generator", "subset", "sampler", "worker"]


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("samples", [7, 40])
def test_the_whole_is_the_probe_set(name: str, samples: int) -> None:
    trainer = make_trainer()
    population = read_population(trainer, LOADERS[name](), samples=samples, seed=5)
    read = read_probe_set(trainer, LOADERS[name](), samples=samples, seed=5)
    assert_same(population.whole(), read, equal=name not in BY_INDEX)
    assert population.total == read.total
    if name in BY_INDEX:
        population = read_population(trainer, LOADERS[name](), samples=samples, micro_batch_size=2, batch_size=5)
        assert_same(population.whole(), read_probe_set(trainer, LOADERS[name](), samples=samples, batch_size=2))


@pytest.mark.parametrize("name", BY_INDEX)
def test_mini_batches_hold_samples_of_the_set_with_the_same_augmentation(name: str) -> None:
    population = given(LOADERS[name](), samples=9, batch_size=7, micro_batch_size=3)
    held = {tuple(row) for part in population.whole().batches for row in part.batch.tolist()}
    for number in range(10):
        parts = population.draw(4, number)
        assert [part.size for part in parts] == [len(part.batch) for part in parts] == [3, 3, 1]
        drawn = [tuple(row) for part in parts for row in part.batch.tolist()]
        assert len(set(drawn)) == 7
        assert set(drawn) <= held


def test_a_draw_follows_from_seed_key_and_number_alone() -> None:
    loader = DataLoader(NUMBERS, batch_size=4, shuffle=True)
    first, again, other = (given(loader, micro_batch_size=2, seed=seed) for seed in (1, 1, 2))
    places = list(itertools.product(range(5), range(5)))
    drawn = {place: first.draw(*place) for place in places}
    for place in reversed(places):
        assert [(part.seed, numbers([part])) for part in again.draw(*place)] == [
            (part.seed, numbers([part])) for part in drawn[place]
        ]
    # 25 of the 5040 ordered draws of 4 from 10: two are equal with 6 %, three pairs are with less than 1e-4.
    assert len({tuple(numbers(parts)) for parts in drawn.values()}) > 22
    seeds = [part.seed for parts in drawn.values() for part in parts]
    seeds += [part.seed for place in places for part in other.draw(*place)]
    seeds += [part.seed for part in first.whole().batches]
    assert len(set(seeds)) == len(seeds) == 25 * 2 * 2 + 5


def test_all_samples_are_drawn_equally_often() -> None:
    population = given(DataLoader(NUMBERS, batch_size=4))
    assert not population.replacement
    drawn = [numbers(population.draw(0, number)) for number in range(2000)]
    assert all(len(set(one)) == 4 for one in drawn)
    counts = torch.bincount(torch.tensor(drawn).flatten(), minlength=10).tolist()
    # Without replacement counts vary less: by (1 − b/n) n/(n − 1).
    assert_frequencies(counts, [0.1] * 10, scale=(10 - 1) / (10 - 4))


@pytest.mark.parametrize("kind", ["samples", "batches"])
def test_two_draws_are_independent(kind: str) -> None:
    # The mean of g_Bᵀ H_B' g_B over draws then contains the full Hessian: B' equals B as often as any other batch.
    loader = DataLoader(NUMBERS[:4], batch_size=1) if kind == "samples" else [torch.tensor([i]) for i in range(4)]
    population = given(loader)
    counts = [0] * 16
    for pair in range(1600):
        (first,), (second,) = (numbers(population.draw(3, 2 * pair + i)) for i in (0, 1))
        counts[4 * first + second] += 1
    assert_frequencies(counts, [1 / 16] * 16)


def test_with_replacement_where_the_sampler_replaces() -> None:
    sampler = RandomSampler(NUMBERS, replacement=True, num_samples=30)
    population = populate(DataLoader(NUMBERS, batch_size=4, sampler=sampler), {"accumulate_grad_batches": 3})
    assert (population.replacement, population.batch_size, population.total) == (True, 12, 10)
    drawn = [numbers(population.draw(0, number)) for number in range(500)]
    assert all(len(one) == 12 for one in drawn)
    assert_frequencies(torch.bincount(torch.tensor(drawn).flatten(), minlength=10).tolist(), [0.1] * 10)
    # Two places of a mini-batch hold the same sample with probability 1/n.
    same = sum(one[0] == one[7] for one in drawn)
    assert_frequencies([same, 500 - same], [0.1, 0.9])


def test_by_weights_with_replacement() -> None:
    weights = [0.0, 3.0, 0.0, 1.0, 6.0]
    sampler = WeightedRandomSampler(weights, num_samples=50)
    population = given(DataLoader(NUMBERS, batch_size=8, sampler=sampler))
    assert (population.replacement, population.batch_size, population.total) == (True, 8, 3)
    drawn = torch.tensor([numbers(population.draw(0, number)) for number in range(250)])
    assert_frequencies(torch.bincount(drawn.flatten(), minlength=5)[[1, 3, 4]].tolist(), [0.3, 0.1, 0.6])
    # The same for a subset of the samples.
    part = given(DataLoader(NUMBERS, batch_size=8, sampler=sampler), samples=2, seed=1)
    left = numbers(part.whole().batches)
    drawn = torch.tensor([numbers(part.draw(0, number)) for number in range(250)])
    total = sum(weights[one] for one in left)
    assert_frequencies([int((drawn == one).sum()) for one in left], [weights[one] / total for one in left])


def test_by_weights_without_replacement() -> None:
    weights = [1.0, 0.0, 2.0, 3.0]
    sampler = WeightedRandomSampler(weights, num_samples=3, replacement=False)
    population = given(DataLoader(NUMBERS[:4], batch_size=2, sampler=sampler))
    assert not population.replacement
    drawn = [tuple(sorted(numbers(population.draw(0, number)))) for number in range(1200)]
    pairs = [(0, 2), (0, 3), (2, 3)]
    assert set(drawn) <= set(pairs)
    # Samples are drawn one after the other, by the weights of those that remain.
    total = sum(weights)
    probabilities = [
        weights[a] / total * weights[b] / (total - weights[a]) + weights[b] / total * weights[a] / (total - weights[b])
        for a, b in pairs
    ]
    assert_frequencies([drawn.count(pair) for pair in pairs], probabilities)


@pytest.mark.parametrize(
    ("sampler", "held"), [(SubsetRandomSampler([8, 1, 6]), {1, 6, 8}), (Odd(), {1, 3, 7, 9})], ids=["subset", "user's"]
)
def test_only_what_a_sampler_draws_from(sampler: Any, held: set[int]) -> None:
    population = given(DataLoader(NUMBERS, batch_size=2, sampler=sampler))
    drawn = {number for index in range(50) for number in numbers(population.draw(0, index))}
    # Each is missing with probability at most (1 − 2/4)^50.
    assert drawn == held


@pytest.mark.parametrize(
    ("make", "trainer_options", "options", "sizes"),
    [
        (lambda: DataLoader(NUMBERS, batch_size=4), {}, {}, [4]),
        (lambda: DataLoader(NUMBERS, batch_size=2), {"accumulate_grad_batches": 3}, {}, [2, 2, 2]),
        (lambda: DataLoader(NUMBERS, batch_size=2), {"accumulate_grad_batches": 3}, {"batch_size": 5}, [2, 2, 1]),
        (lambda: DataLoader(NUMBERS, batch_size=8), {}, {"micro_batch_size": 3}, [3, 3, 2]),
        (lambda: DataLoader(NUMBERS, batch_size=8), {}, {"samples": 9}, [8]),
        # The epoch is shorter than a step.
        (lambda: DataLoader(NUMBERS, batch_size=4), {"accumulate_grad_batches": 4}, {"samples": 10}, [4, 4, 2]),
        (lambda: DataLoader(NUMBERS, 4, True, drop_last=True), {"accumulate_grad_batches": 4}, {}, [4, 4]),
        (lambda: DataLoader(NUMBERS, 4), {"limit_train_batches": 1, "accumulate_grad_batches": 2}, {}, [4]),
    ],
    ids=["loader", "accumulation", "batch size", "micro", "samples", "epoch", "drop last", "limit"],
)
def test_a_mini_batch_is_as_large_as_the_data_of_a_step(
    make: Callable[[], Any], trainer_options: dict[str, Any], options: dict[str, Any], sizes: list[int]
) -> None:
    population = populate(make(), trainer_options, **options)
    assert population.batch_size == sum(sizes)
    for number in range(3):
        parts = population.draw(7, number)
        assert [part.size for part in parts] == sizes
        assert len(set(numbers(parts))) == sum(sizes)


def test_a_mini_batch_of_a_given_loader_is_one_batch() -> None:
    population = populate([torch.zeros(1)], {"accumulate_grad_batches": 3}, dataloader=DataLoader(NUMBERS, 4))
    assert population.batch_size == len(numbers(population.draw(0, 0))) == 4


def test_batches_have_the_form_of_the_trainers() -> None:
    data = [{"x": torch.full((3,), float(i)), "name": str(i)} for i in range(3)]
    population = populate({"only": DataLoader(data, batch_size=2)})
    for parts in (population.whole().batches, population.draw(0, 0)):
        batch = parts[0].batch["only"]
        assert batch["name"] == [str(int(x[0])) for x in batch["x"]]


class Collation:
    """Writes into its samples, and returns the same memory each time."""

    def __init__(self) -> None:
        self.buffer: dict[str, Tensor] = {}

    def __call__(self, rows: list[Tensor]) -> dict[str, Tensor]:
        for row in rows:
            row += 100.0
        self.buffer["x"] = self.buffer.get("x", torch.empty(0)).resize_(len(rows)).copy_(torch.stack(rows))
        return self.buffer


@pytest.mark.parametrize("replacement", [False, True])
def test_samples_are_safe_from_collate_and_batches_from_each_other(replacement: bool) -> None:
    data = [torch.tensor(float(i)) for i in range(6)]
    sampler = RandomSampler(data, replacement=replacement)  # type: ignore[arg-type]
    loader = DataLoader(data, batch_size=6, sampler=sampler, collate_fn=Collation())  # type: ignore[arg-type]
    population = given(loader, micro_batch_size=2)
    for _ in range(2):
        whole = population.whole().batches
        assert [part.batch["x"].tolist() for part in whole] == [[100.0, 101.0], [102.0, 103.0], [104.0, 105.0]]
    mini_batches = [population.draw(0, number) for number in range(20)]
    held = [[int(x) - 100 for part in parts for x in part.batch["x"]] for parts in mini_batches]
    assert all(set(one) <= set(range(6)) for one in held)
    assert any(len(set(one)) < 6 for one in held) is replacement
    assert [one.item() for one in data] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    # They do not change when the dataset's memory does.
    for one in data:
        one.fill_(-1.0)
    assert population.whole().batches[0].batch["x"].tolist() == [100.0, 101.0]
