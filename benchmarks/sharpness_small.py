"""Compares one mini-batch at a time with many at once, on models that take longer to launch than to compute."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from statistics import median
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from sharpness_recipes import RECIPES
from timing import Clock, Spread
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from lightning_curvature import BatchSharpnessMonitor

_SAMPLES, _BATCHES, _CLASSES = 1024, 64, 10

SMALL_LEGEND = f"""\
`BatchSharpnessMonitor(quantities=("batch_sharpness",))` inside a Trainer, {_BATCHES} mini-batches a measurement: the
monitor's whole time for each mini-batch, drawing and collating included. *In turn* is `batches_at_once=1`, *at once*
`batches_at_once=16`. *Plain recipe*: a gradient with its graph and a product of a given mini-batch, in PyTorch alone.
MFLOP of one forward of a mini-batch. Median over measurements; *gain* is in turn over at once [quartiles]. *auto* is
the choice of `batches_at_once="auto"`.
"""


class Tokens(nn.Module):
    """A transformer layer on an input cut into eight tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True)
        self.head = nn.Linear(width, _CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 64) → (B, 10)."""
        return self.head(self.layer(self.embed(x.reshape(len(x), 8, 8))).mean(dim=1))


def mlp(*widths: int) -> nn.Sequential:
    """Layers with tanh between them."""
    layers: list[nn.Module] = []
    for before, after in zip(widths, [*widths[1:], _CLASSES], strict=True):
        layers += [nn.Linear(before, after), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def cnn(channels: int) -> nn.Sequential:
    """Two convolutions on images of 8 × 8."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, channels, 3, padding=1),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(channels, 2 * channels, 3, padding=1),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * channels, _CLASSES),
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "MLP, 64–32": lambda: mlp(64, 32),
    "MLP, 64–64–64": lambda: mlp(64, 64, 64),
    "MLP, 64–128–128": lambda: mlp(64, 128, 128),
    "MLP, 64–200–200": lambda: mlp(64, 200, 200),
    "MLP, 64–256–256": lambda: mlp(64, 256, 256),
    "MLP, 64–512–512": lambda: mlp(64, 512, 512),
    "CNN, 8 channels": lambda: cnn(8),
    "CNN, 32 channels": lambda: cnn(32),
    "transformer, width 32": lambda: Tokens(32),
    "transformer, width 64": lambda: Tokens(64),
    "transformer, width 128": lambda: Tokens(128),
}


class Learner(pl.LightningModule):
    """Plain training of a network."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Timed(BatchSharpnessMonitor):
    """The monitor, with the seconds of each measurement."""

    def __init__(self, clock: Clock, **options: Any) -> None:
        super().__init__(
            every_n_train_steps=1, num_batches=_BATCHES, min_batches=_BATCHES, relative_error=1e-9, **options
        )
        self.clock, self.seconds = clock, list[float]()

    def measure(self, *args: Any) -> Any:
        """Measure, on the clock."""
        start = self.clock.now()
        result = super().measure(*args)
        self.seconds.append(self.clock.now() - start)
        return result


def _measured(network: nn.Module, clock: Clock, size: int, rounds: int, count: Any) -> Timed:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_SAMPLES, 64, generator=generator)
    y = torch.randint(_CLASSES, (_SAMPLES,), generator=generator)
    follow = Timed(clock, batches_at_once=count, on_error="raise")
    trainer = pl.Trainer(
        # The first measurement chooses, and is left out.
        max_steps=rounds + 1,
        callbacks=[follow],
        accelerator="cpu" if clock.device.type == "cpu" else "gpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Learner(network), DataLoader(TensorDataset(x, y), batch_size=size, shuffle=True))
    return follow


def _plain(network: nn.Module, clock: Clock, size: int) -> float:
    """Seconds of the plain recipe for a mini-batch."""
    x = torch.randn(size, 64, device=clock.device)
    y = torch.randint(_CLASSES, (size,), device=clock.device)
    net: Any = SimpleNamespace(rows=network, parameters=list(network.parameters()))
    start = clock.now()
    RECIPES["plain recipe"].measure(net, [(x, y)] * _BATCHES)
    return (clock.now() - start) / _BATCHES


def small(clock: Clock, sizes: list[int], rounds: int, names: list[str]) -> list[str]:
    """Rows of the table."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*(num_workers|many workers|LeafSpec|GPU available).*")
    lines = [
        "| network | parameters | samples | MFLOP | plain recipe, ms | in turn, ms | at once, ms | gain | auto |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in names:
        for size in sizes:
            torch.manual_seed(0)
            network = NETWORKS[name]().to(clock.device)
            x = torch.zeros(size, 64, device=clock.device)
            # The math kernel of attention, which the monitor differentiates.
            with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as operations:
                network(x)
            plain = 1e3 * median(_plain(network, clock, size) for _ in range(3))
            runs = {count: _measured(network, clock, size, rounds, count) for count in (1, 16)}
            in_turn, at_once = ([1e3 * s / _BATCHES for s in run.seconds[1:]] for run in runs.values())
            gain = Spread.of([one / other for one, other in zip(in_turn, at_once, strict=True)])
            auto = _measured(network, clock, size, 0, "auto")._measurement.pairs_at_once or 1
            lines.append(
                f"| {name} | {sum(p.numel() for p in network.parameters()):,} | {size} | "
                f"{operations.get_total_flops() / 1e6:.2f} | {plain:.2f} | {median(in_turn):.2f} | "
                f"{median(at_once):.2f} | {gain.middle:.2f} [{gain.low:.2f}, {gain.high:.2f}] | "
                f"{'at once' if auto > 1 else 'in turn'} |"
            )
    return lines
