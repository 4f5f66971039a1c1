"""A run that is resumed within an epoch measures on the samples of the unbroken one, whatever chose them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, Sampler, TensorDataset

from lightning_curvature.data.position import Bookmark, position_of
from lightning_curvature.data.probe_set import read_probe_set
from lightning_curvature.reporting.loggers import CurvatureWarning
from tests.compatibility.monitors import MONITORS
from tests.helpers.runs import Capture, Classifier, classification, loader, make_trainer, rows

SAMPLES, SIZE, EPOCHS = 40, 8, 3
BATCHES = SAMPLES // SIZE
((X, Y),) = classification(1, SAMPLES)


class Place:
    """An order of its own for each epoch, and where the run stands in it."""

    def __init__(self) -> None:
        self.epoch = self.begin = self.done = 0

    def numbers(self) -> list[int]:
        return torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(self.epoch)).tolist()

    def batches(self) -> Iterator[list[int]]:
        """Indices of the epoch's batches from where a checkpoint left it."""
        order = self.numbers()
        self.done, self.begin = self.begin, 0
        while self.done < BATCHES:
            self.done += 1
            at = SIZE * self.done
            if self.done == BATCHES:
                self.done, self.epoch = 0, self.epoch + 1
            yield order[at - SIZE : at]
            if self.done == 0:
                return

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.begin = state["epoch"], state["done"]


class Plain(Place):
    """Any object that can be iterated."""

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[Any]:
        return ((X[batch], Y[batch]) for batch in self.batches())


class Held(DataLoader[Any]):
    """Hands its state to the object that chooses the samples."""

    place: Any

    def state_dict(self) -> dict[str, int]:
        return self.place.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place.load_state_dict(state)


class OfBatches(Place, Sampler[list[int]]):
    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[list[int]]:
        return self.batches()


class OfSamples(OfBatches):
    """The first 32 samples of the epoch's order alone; the others never in this epoch."""

    def __len__(self) -> int:
        return SAMPLES - SIZE

    def __iter__(self) -> Iterator[Any]:
        return (index for number, batch in enumerate(self.batches()) for index in batch if number < BATCHES - 1)


class Stream(Place, IterableDataset[Any]):
    def __len__(self) -> int:
        return SAMPLES

    def __iter__(self) -> Iterator[Any]:
        return ((X[index], Y[index]) for batch in self.batches() for index in batch)


def held(place: Any, *args: Any, **options: Any) -> Held:
    made = Held(*args, **options)
    made.place = place
    return made


def batch_sampled() -> Held:
    sampler = OfBatches()
    return held(sampler, TensorDataset(X, Y), batch_sampler=sampler)


def streamed() -> Held:
    stream = Stream()
    return held(stream, stream, batch_size=SIZE)


LOADERS: dict[str, Callable[[], Any]] = {"plain": Plain, "batch sampler": batch_sampled, "stream": streamed}
FEWER: dict[str, dict[str, Any]] = {
    "spectrum": {"probe_samples": 2 * SIZE, "micro_batch_size": None},
    "sharpness": {"probe_samples": 2 * SIZE},
    "stabilization": {},
    "noise": {"probe_samples": 2 * SIZE},
}


class Every(pl.Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


def fit(data: Any, *callbacks: pl.Callback, resume: Path | None = None) -> dict[int, dict[str, float]]:
    capture = Capture()
    trainer = make_trainer(*callbacks, logger=capture, max_epochs=EPOCHS)
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)).double()
    module = Classifier(network, lambda module: torch.optim.SGD(module.parameters(), lr=0.1))
    trainer.fit(module, data, ckpt_path=resume)
    return rows(capture)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("name", FEWER)
@pytest.mark.thinned(11)
def test_resumed(name: str, kind: str) -> None:
    """From the middle of the second epoch, by the first and by a second interruption."""
    if name in ("stabilization", "noise") and kind != "stream":
        pytest.skip("reads single samples, or needs a batch size")
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder, "first"), Path(folder, "second")
        unbroken = fit(LOADERS[kind](), MONITORS[name].make(**FEWER[name]), Every(first))
        resumed = fit(LOADERS[kind](), MONITORS[name].make(**FEWER[name]), Every(second), resume=first / "7.ckpt")
        again = fit(LOADERS[kind](), MONITORS[name].make(**FEWER[name]), resume=second / "11.ckpt")
    assert list(unbroken) == [0, 3, 6, 9, 12]
    for found in (resumed, again):
        assert len(found) > 0
        for step, row in found.items():
            for key, value in row.items():
                assert value == pytest.approx(unbroken[step][key], rel=1e-9, nan_ok=True), (step, key)


@pytest.mark.parametrize("kind", LOADERS)
def test_no_effect_on_the_loader(kind: str) -> None:
    """The run's own loader is where it was, also where the copy shares an object with it."""
    data, place = LOADERS[kind](), Place()
    place.load_state_dict({"epoch": 2, "done": 1})
    owner = getattr(data, "place", data)
    vars(owner).update(vars(place))
    before = position_of(data)
    bookmark = Bookmark([position_of(LOADERS[kind]())])
    probes = [
        read_probe_set(make_trainer(), one, samples=2 * SIZE, bookmark=bookmark) for one in (data, LOADERS[kind]())
    ]
    assert bookmark.positions
    assert position_of(data) == before != bookmark.positions[0]
    first, second = ([batch.batch for batch in probe.batches] for probe in probes)
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, second, strict=True))


def test_subset_of_an_epoch() -> None:
    """A sampler that draws other samples in each epoch: those of the first reading."""

    def made(epoch: int) -> Held:
        sampler = OfSamples()
        sampler.epoch = epoch
        return held(sampler, TensorDataset(X, Y), batch_size=SIZE, sampler=sampler)

    bookmark = Bookmark()
    read = [read_probe_set(make_trainer(), made(epoch), samples=None, bookmark=bookmark) for epoch in (0, 3)]
    samples = [torch.cat([batch.batch[0] for batch in probe.batches]) for probe in read]
    assert len(samples[0]) == SAMPLES - SIZE
    assert torch.equal(*samples)
    fresh = read_probe_set(make_trainer(), made(3), samples=None)
    assert not torch.equal(torch.cat([batch.batch[0] for batch in fresh.batches]), samples[0])


def test_orders_of_all_kinds_come_back() -> None:
    """Lists, tensors and arrays of whole numbers, in containers and objects; texts and data are left alone."""

    class Everything(Plain):
        def __init__(self, shift: int) -> None:
            super().__init__()
            self.order, self.tensor, self.array = [shift, 1], torch.arange(2) + shift, numpy.arange(2) + shift
            self.inside, self.root, self.data = {"deep": [{"count": shift}]}, f"folder {shift}", torch.zeros(2, 2)

    first, later = Everything(0), Everything(5)
    Bookmark([position_of(first)]).go_to(make_trainer(), later)
    assert (later.order, later.inside, later.root) == ([0, 1], {"deep": [{"count": 0}]}, "folder 5")
    assert later.tensor.tolist() == [0, 1]
    assert isinstance(later.array, numpy.ndarray)
    assert later.array.tolist() == [0, 1]


@pytest.mark.parametrize("plain", [loader(classification(2)), DataLoader(TensorDataset(X, Y), 8, shuffle=True)])
def test_loaders_of_torch_have_none(plain: Any) -> None:
    """So nothing is written to checkpoints, and ranks exchange nothing."""
    assert position_of(plain) == {}


def test_another_number_of_ranks() -> None:
    with pytest.warns(CurvatureWarning, match="first read on 2 ranks, and is read again on 1"):
        Bookmark([{"epoch": 0}] * 2).go_to(make_trainer(), Plain())
