"""Networks that the benchmarks train: an MLP, ResNet-9, GPTs of about 2 M and of 124 M parameters, a chain of 1,000."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

# Distinct batches of one workload, cycled through: enough that no step repeats its neighbours.
BATCHES = 8

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Workload:
    """One network with its data.

    Attributes:
        title: heading of its table.
        build: makes the LightningModule; its ``forward`` maps inputs to logits, (B, V) or (B, T, V).
        batches: inputs and integer targets on the CPU.
        precision: the Trainer's.
        repeats: timed measured steps for each estimator, unless the command line names another number.
    """

    title: str
    build: Callable[[], pl.LightningModule]
    batches: list[Batch]
    precision: Any = "32-true"
    repeats: int = 10

    def make(self) -> pl.LightningModule:
        """The module as every run of this workload starts from it."""
        torch.manual_seed(0)
        return self.build()


class Cycle(Dataset):
    """The batches of a workload, over and over, ``steps`` in all."""

    def __init__(self, batches: list[Batch], steps: int) -> None:
        self.batches = batches
        self.steps = steps

    def __len__(self) -> int:
        """Number of steps."""
        return self.steps

    def __getitem__(self, i: int) -> Batch:
        """Batch of step ``i``."""
        if i >= self.steps:
            raise IndexError(i)
        return self.batches[i % len(self.batches)]


class Classifier(pl.LightningModule):
    """A network, its cross-entropy and its optimizer, as a user would write them."""

    def __init__(self, network: nn.Module, optimizer: Callable[[Any], torch.optim.Optimizer]) -> None:
        super().__init__()
        self.network = network
        self.optimizer = optimizer

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, V)."""
        return self.network(x)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean cross-entropy."""
        loss = loss_of(self, batch)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer at its constant learning rate."""
        return self.optimizer(self.parameters())


def loss_of(module: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of logits (..., V) against targets (...)."""
    x, y = batch
    return F.cross_entropy(module(x).flatten(0, -2), y.flatten())


def _example(name: str) -> ModuleType:
    """Module of the examples, which are scripts that import each other from their own folder and no package."""
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))
    return importlib.import_module(name)


def _random(shape: tuple[int, ...], classes: int) -> list[Batch]:
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(*shape, generator=g), torch.randint(classes, shape[:1], generator=g)) for _ in range(BATCHES)]


def mlp(npz: Path | None) -> Workload:
    """MLP of 0.9 M parameters on noise."""
    models = _example("models")
    return Workload(
        "MLP, batch 512",
        lambda: Classifier(models.MLP(in_features=784, width=512, depth=3), partial(torch.optim.SGD, lr=0.1)),
        _random((512, 784), classes=10),
        repeats=30,
    )


def resnet9(npz: Path | None) -> Workload:
    """ResNet-9 of the examples on CIFAR-10 images from ``npz``, else on noise."""
    models = _example("models")
    batches = _random((32, 3, 32, 32), classes=10)
    if npz is not None:
        data = _example("data").FullBatchData(dataset="cifar10", samples=32 * BATCHES, micro_batch=32, npz=npz)
        data.setup()
        batches = data.batches
    images = "CIFAR-10" if npz is not None else "random images"
    return Workload(
        f"ResNet-9, batch 32, {images}",
        lambda: Classifier(models.ResNet9(), partial(torch.optim.AdamW, lr=2e-4)),
        batches,
        repeats=10,
    )


def gpt(npz: Path | None) -> Workload:
    """Transformer of the examples on the sources of Python's standard library."""
    example = _example("char_transformer")
    size, context = 8, 128
    text = example.Characters(example.default_text(), context=context)
    items = [text[i] for i in range(size * BATCHES)]
    batches = [tuple(torch.stack(parts) for parts in zip(*items[i::BATCHES], strict=True)) for i in range(BATCHES)]
    return Workload(
        f"GPT, batch {size} × {context}",
        lambda: example.CharTransformer(vocabulary_size=len(text.vocabulary), context=context, width=192, layers=4),
        batches,  # type: ignore[arg-type]
        repeats=20,
    )


def deep(npz: Path | None) -> Workload:
    """Chain of 1,000 tiny modules on noise: the cost of looking at them is all that there is to see."""
    return Workload(
        "1,000 submodules, batch 32",
        lambda: Classifier(
            nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(333))),
            partial(torch.optim.SGD, lr=0.01),
        ),
        _random((32, 8), classes=8),
        repeats=20,
    )


def large_gpt(npz: Path | None) -> Workload:
    """GPT-2's smallest size under bf16-mixed, on random tokens: for a GPU."""
    example = _example("char_transformer")
    size, context, vocabulary = 4, 1024, 50257
    g = torch.Generator().manual_seed(1)
    tokens = [torch.randint(vocabulary, (size, context + 1), generator=g) for _ in range(BATCHES)]
    return Workload(
        f"GPT-2 small, batch {size} × {context}, bf16-mixed",
        lambda: example.CharTransformer(
            vocabulary_size=vocabulary, context=context, width=768, heads=12, layers=12, learning_rate=3e-4
        ),
        [(t[:, :-1].contiguous(), t[:, 1:].contiguous()) for t in tokens],
        precision="bf16-mixed",
        repeats=20,
    )


WORKLOADS: dict[str, Callable[[Path | None], Workload]] = {
    "mlp": mlp,
    "resnet9": resnet9,
    "gpt": gpt,
    "deep": deep,
    "large": large_gpt,
}
