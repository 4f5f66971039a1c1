"""Small runs: modules, data, a Trainer without trimmings, and what an independent eye notes of each step."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_curvature import CurvatureWarning
from lightning_curvature.reporting.names import full_name
from tests.oracles.dense import Loss, Part, Reference, reference

Batch = tuple[Tensor, Tensor]
MakeOptimizer = Callable[[nn.Module], Any]


class Classifier(pl.LightningModule):
    """A module as users write it: forward, a loss, an optimizer."""

    def __init__(self, network: nn.Module, make_optimizer: MakeOptimizer, loss: Loss = F.cross_entropy) -> None:
        super().__init__()
        self.network = network
        self.make_optimizer = make_optimizer
        self.loss = loss

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        x, y = batch
        loss = self.loss(self(x), y)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self)


# Where values and diagnostics stand.
GROUPS = ("curvature/", "curvature_diagnostics/")


class Capture(Logger):
    """A logger that keeps every row: ``rows[step][key]``."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, dict[str, float]] = {}

    @property
    def name(self) -> str:
        return "capture"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.setdefault(step or 0, {}).update(metrics)

    def curve(self, key: str) -> list[float]:
        """Values of a key in the order of steps."""
        return [row[key] for _, row in sorted(self.rows.items()) if key in row]


@dataclass
class Step:
    """What an optimizer step started from and led to, noted without any code of the package."""

    parts: list[Part]
    before: dict[str, Tensor]
    after: dict[str, Tensor] = field(default_factory=dict)
    lr: float = 0.0


class StepRecorder(pl.Callback):
    """Notes each optimizer step of ``module.network``. Must stand before the monitor in the list of callbacks."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._parts: list[Part] = []
        self._open: Step | None = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        buffers = {name: b.clone() for name, b in pl_module.network.named_buffers()}
        self._parts.append(Part(batch[0].clone(), batch[1].clone(), torch.get_rng_state(), buffers))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if self._open is None:  # LBFGS comes here several times
            before = {name: p.detach().clone() for name, p in pl_module.network.named_parameters()}
            self._open = Step(self._parts, before, lr=optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._open is not None:
            self._open.after = {name: p.detach().clone() for name, p in pl_module.network.named_parameters()}
            self.steps.append(self._open)
            self._open, self._parts = None, []


def mlp(*sizes: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Fully connected network with tanh between the layers; smooth, so that finite differences converge."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).to(dtype)


def classification(
    count: int, size: int = 8, features: int = 4, classes: int = 3, seed: int = 1, dtype: torch.dtype = torch.float64
) -> list[Batch]:
    """Batches of noise with labels; the last may be given another size by slicing."""
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, features, generator=g, dtype=dtype), torch.randint(classes, (size,), generator=g))
        for _ in range(count)
    ]


def loader(batches: list[Batch]) -> DataLoader:
    """Loader that hands out the batches as they are."""
    return DataLoader(batches, batch_size=None, shuffle=False)  # type: ignore[arg-type]


def batched_samples(count: int = 16, shuffle: bool = False, dtype: torch.dtype = torch.float64) -> DataLoader[Any]:
    """Single samples of a classification in batches of eight."""
    return DataLoader(TensorDataset(*classification(1, count, dtype=dtype)[0]), batch_size=8, shuffle=shuffle)


def make_trainer(*callbacks: pl.Callback, logger: Any = None, **kwargs: Any) -> pl.Trainer:
    """Trainer on one CPU process that leaves nothing on disk."""
    options: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "precision": "64-true",
        "logger": logger if logger is not None else False,
        "callbacks": list(callbacks),
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "log_every_n_steps": 1,
    }
    return pl.Trainer(**(options | kwargs))


@dataclass
class Outcome:
    """A finished run."""

    trainer: pl.Trainer
    module: Any
    capture: Capture
    steps: list[Step]

    def reference(self, index: int, gauss_newton: bool = True) -> Reference:
        """The oracle's values of one optimizer step."""
        step = self.steps[index]
        module = self.module
        return reference(module.network, module.loss, step.parts, step.before, step.after, gauss_newton)


def run(module: pl.LightningModule, batches: list[Batch], *callbacks: pl.Callback, **kwargs: Any) -> Outcome:
    """Fit with the callbacks and an independent recorder before them."""
    capture, recorder = Capture(), StepRecorder()
    trainer = make_trainer(recorder, *callbacks, logger=capture, **kwargs)
    trainer.fit(module, loader(batches))
    return Outcome(trainer, module, capture, recorder.steps)


# A configuration of the command line, up to the monitors.
YAML_TRAINER = """
trainer:
  accelerator: cpu
  devices: 1
  max_epochs: 1
  precision: 64-true
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
"""


def warned(action: Callable[[], Any]) -> list[str]:
    """Messages of the package's warnings, each as often as a user would see it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        action()
    return [str(w.message) for w in caught if issubclass(w.category, CurvatureWarning)]


def rows(capture: Capture, prefix: str = "curvature") -> dict[int, dict[str, float]]:
    """Rows of the measured steps, values and diagnostics, keys without the prefix."""
    found = {step: own(row, prefix) for step, row in sorted(capture.rows.items())}
    return {step: row for step, row in found.items() if row}


def own(row: Mapping[str, float], prefix: str = "curvature") -> dict[str, float]:
    """Values and diagnostics of a monitor out of one row, keys without the prefix."""
    groups = (f"{prefix}/", full_name(prefix, "epsilon").removesuffix("epsilon"))
    return {key.removeprefix(group): row[key] for key in row for group in groups if key.startswith(group)}
