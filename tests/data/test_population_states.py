"""Reading a population and drawing from it leaves the run unchanged, and gives the same bits each time."""

from __future__ import annotations

import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from lightning_curvature.data.population import Population, read_population
from tests.helpers.population import given
from tests.helpers.reading_states import IN_PROCESS, LOADERS, Augment, Samples, assert_equal, everything, fit
from tests.helpers.runs import make_trainer


class Drawer(pl.Callback):
    """Reads, and draws two mini-batches, in each of two epochs."""

    def __init__(self) -> None:
        self.drawn: list[list[Tensor]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx in (0, 2):
            population = read_population(trainer, samples=9, seed=5)
            parts = [*population.whole().batches, *population.draw(0, 0), *population.draw(1, 1)]
            self.drawn.append([part.batch for part in parts])


class Noisy:
    """Adds numbers from its generators and from the global ones to each sample."""

    def __init__(self, fails: bool = False) -> None:
        self.augment = Augment()
        self.fails = fails

    def __call__(self, rows: list[Tensor]) -> Tensor:
        batch = default_collate([torch.cat([row, self.augment(0)]) for row in rows])
        if self.fails:
            raise OSError("no such batch")
        return batch


@pytest.mark.parametrize("name", LOADERS)
def test_training_does_not_notice(name: str) -> None:
    drawer = Drawer()
    assert_equal(fit(LOADERS[name](), drawer), fit(LOADERS[name]()))
    assert len(drawer.drawn) == 4
    for again in drawer.drawn[1:]:
        assert_equal(again, drawer.drawn[0])


@pytest.mark.parametrize("name", IN_PROCESS)
def test_states_are_put_back_when_reading_fails(name: str) -> None:
    loader = LOADERS[name](bad=10)
    before = everything(loader)
    with pytest.raises(OSError, match="no such sample"):
        read_population(make_trainer(), loader, samples=96)
    assert everything(loader) == before


@pytest.mark.parametrize("name", IN_PROCESS)
def test_a_later_process_draws_the_same_bits(name: str) -> None:
    def drawn(population: Population) -> list[Tensor]:
        return [part.batch for number in range(3) for part in population.draw(2, number)]

    first = drawn(given(LOADERS[name](), samples=9))
    torch.rand(3), random.random()
    assert_equal(drawn(given(LOADERS[name](first_draws=2), samples=9)), first)


def states(collate: Noisy) -> list[Any]:
    python, named, legacy = collate.augment.parts
    of_numpy: Any = np.random
    return [
        [random.getstate(), torch.get_rng_state().tolist(), collate.augment.torch.get_state().tolist()],
        [(one.get_state()[1].tolist(), one.get_state()[2]) for one in (of_numpy, legacy)],
        [python.getstate(), named["numpy"].bit_generator.state],
    ]


def test_collate_draws_anew_for_each_micro_batch_and_moves_no_state() -> None:
    collate = Noisy()
    population = given(DataLoader(Samples(), batch_size=6, collate_fn=collate), micro_batch_size=3)
    before = states(collate)

    def draws() -> list[Tensor]:
        parts = [*population.whole().batches]
        parts += [part for place in ((0, 0), (0, 1), (1, 0)) for part in population.draw(*place)]
        return [part.batch[:, 9:] for part in parts]

    first = draws()
    assert states(collate) == before
    torch.rand(1), random.random(), collate.augment.own()
    moved = states(collate)
    assert_equal(draws(), first)
    assert states(collate) == moved
    # Each of seven generators gives each sample of each micro-batch another number; torch's global one has 24 bits.
    assert [len(batch) for batch in first] == [3] * 10
    for column in torch.cat(first).T:
        assert len(column.unique()) == 30


def test_states_are_put_back_when_collate_fails() -> None:
    collate = Noisy(fails=True)
    population = given(DataLoader(Samples(), batch_size=3, collate_fn=collate))
    before = states(collate)
    for fail in (population.whole, lambda: population.draw(0, 0)):
        with pytest.raises(OSError, match="no such batch"):
            fail()
    assert states(collate) == before


def test_the_dataset_of_the_workers_has_opened_no_file() -> None:
    loader = LOADERS["worker"]()
    assert len(given(loader).draw(0, 0)[0].batch) == 3
    assert loader.dataset.dataset.file is None
