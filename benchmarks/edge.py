"""Compares indicators of the edge of stability under mini-batches with what happens when the learning rate is raised.

Each setting (network, optimizer, batch size) trains until it stands where it stays; then the same state goes on with η
times a factor, and the least factor at which the loss grows is the truth: 1/factor is how near the run was to the edge.

    python benchmarks/edge.py                     # all settings, some ten minutes on one core
    python benchmarks/edge.py --fast              # two settings, few steps: does it run?
    python benchmarks/edge.py --out docs/edge_table.md
"""

from __future__ import annotations

import argparse
import copy
import logging
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import lightning.pytorch as pl
import torch
from directional import hardware
from noisy_digits import bare_trainer, noisy_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_curvature import (
    BatchSharpnessMonitor,
    DirectionalCurvatureMonitor,
    HessianSpectrumMonitor,
    StabilityMonitor,
)

SAMPLES = 1500
FACTORS = (1.15, 1.3, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0)
SEEDS = (1, 2)
# A branch ends higher where the mean loss of its last fifth is so many times that of the branch with η as it was, and
# has grown where it is a third of the way from there to the loss of a guess.
HIGHER, GROWN = 1.1, 1.0 / 3.0
EVERY, WINDOW = 10, 30


class Attention(nn.Module):
    """The rows of a digit as tokens, one block of attention and one of GELU."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.places = nn.Linear(8, width), nn.Parameter(0.1 * torch.randn(8, width))
        self.block = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of (B, 64) pixels."""
        return self.head(self.block(self.embed(x.view(-1, 8, 8)) + self.places).mean(1))


def cnn() -> nn.Module:
    """Two convolutions with GELU."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 12, 3, padding=1),
        nn.GELU(),
        nn.Conv2d(12, 24, 3, stride=2, padding=1),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(24 * 16, 10),
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "MLP, GELU": lambda: nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 96), nn.GELU(), nn.Linear(96, 10)),
    "MLP, ReLU": lambda: nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)),
    "CNN, GELU": cnn,
    "attention": Attention,
}
OPTIMIZERS: dict[str, Callable[[Any, float], torch.optim.Optimizer]] = {
    "SGD": lambda p, lr: torch.optim.SGD(p, lr=lr),
    "heavy ball 0.9": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9),
    "heavy ball 0.5": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.5),
    "Nesterov 0.9": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9, nesterov=True),
    "Adam": lambda p, lr: torch.optim.Adam(p, lr=lr),
    "AdamW": lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0.01),
    "RMSprop": lambda p, lr: torch.optim.RMSprop(p, lr=lr),
}


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross-entropy": nn.functional.cross_entropy,
    "squared error": lambda z, y: (z - nn.functional.one_hot(y, 10)).square().sum(-1).mean(),
}
OF_A_GUESS = {"cross-entropy": math.log(10.0), "squared error": 0.9}


@dataclass(frozen=True)
class Setting:
    """One run."""

    loss: str
    network: str
    optimizer: str
    lr: float
    batch_size: int


SETTINGS = [
    Setting("cross-entropy", "MLP, GELU", "SGD", 0.2, 8),
    Setting("cross-entropy", "MLP, GELU", "SGD", 0.8, 48),
    Setting("cross-entropy", "CNN, GELU", "SGD", 0.4, 24),
    Setting("cross-entropy", "attention", "SGD", 0.4, 48),
    Setting("cross-entropy", "MLP, GELU", "heavy ball 0.9", 0.04, 24),
    Setting("cross-entropy", "CNN, GELU", "heavy ball 0.9", 0.04, 48),
    Setting("cross-entropy", "attention", "heavy ball 0.9", 0.05, 96),
    Setting("cross-entropy", "MLP, ReLU", "heavy ball 0.5", 0.1, 16),
    Setting("cross-entropy", "MLP, GELU", "Nesterov 0.9", 0.04, 24),
    Setting("cross-entropy", "MLP, GELU", "Adam", 0.006, 24),
    Setting("cross-entropy", "attention", "Adam", 0.006, 96),
    Setting("cross-entropy", "MLP, ReLU", "AdamW", 0.003, 24),
    Setting("squared error", "MLP, GELU", "SGD", 0.2, 8),
    Setting("squared error", "MLP, GELU", "SGD", 0.4, 48),
    Setting("squared error", "attention", "SGD", 0.05, 48),
    Setting("squared error", "MLP, GELU", "heavy ball 0.9", 0.04, 24),
    Setting("squared error", "CNN, GELU", "heavy ball 0.9", 0.06, 96),
    Setting("squared error", "MLP, ReLU", "Nesterov 0.9", 0.04, 48),
    Setting("squared error", "MLP, GELU", "Adam", 0.006, 24),
    Setting("squared error", "CNN, GELU", "RMSprop", 0.003, 48),
]


class Learner(pl.LightningModule):
    """A network, its loss and its optimizer."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network, self.setting = NETWORKS[setting.network](), setting

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The setting's loss."""
        return LOSSES[self.setting.loss](self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The setting's."""
        return OPTIMIZERS[self.setting.optimizer](self.parameters(), self.setting.lr)


class Rows(pl.Callback):
    """Losses of all steps, and what monitors wrote in the second half of the run."""

    def __init__(self, keys: Sequence[str], steps: int) -> None:
        self.losses: list[float] = []
        self.found: dict[str, list[float]] = {key: [] for key in keys}
        self._from = steps // 2

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, *_: Any) -> None:
        """Note loss and values."""
        self.losses.append(float(outputs["loss"]))
        if trainer.global_step > self._from and trainer.global_step % EVERY == 1:
            for key, values in self.found.items():
                values.append(float(trainer.callback_metrics.get(f"curvature/{key}", math.nan)))


def fit(module: Learner, seed: int, steps: int, *callbacks: pl.Callback, state: Any = None, factor: float = 1.0) -> Any:
    """Train; from a state with η times a factor."""
    generator = torch.Generator().manual_seed(seed)
    loader = DataLoader(
        noisy_digits(SAMPLES), batch_size=module.setting.batch_size, shuffle=True, drop_last=True, generator=generator
    )

    class Resume(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            if state is not None:
                pl_module.load_state_dict(state[0])
                trainer.optimizers[0].load_state_dict(copy.deepcopy(state[1]))
            for group in trainer.optimizers[0].param_groups:
                group["lr"] = module.setting.lr * factor

    trainer = bare_trainer(steps, Resume(), *callbacks)
    trainer.fit(module, loader)
    return copy.deepcopy(module.state_dict()), copy.deepcopy(trainer.optimizers[0].state_dict())


def late_loss(setting: Setting, state: Any, steps: int, factor: float) -> float:
    """Return the mean loss of the last fifth of branches with η times a factor."""
    found = []
    for seed in SEEDS:
        rows = Rows([], steps)
        fit(Learner(setting), seed, steps, rows, state=state, factor=factor)
        found.append(mean(rows.losses[-steps // 5 :]))
    return mean(found) if all(map(math.isfinite, found)) else math.inf


def growth_factors(setting: Setting, state: Any, steps: int) -> tuple[float, float]:
    """Return the least factors of η with which the loss ends higher, and has grown; infinite where there is none."""
    plain, higher = late_loss(setting, state, steps, 1.0), math.inf
    grown = plain + GROWN * (OF_A_GUESS[setting.loss] - plain)
    for factor in FACTORS:
        loss = late_loss(setting, state, steps, factor)
        higher = min(higher, factor) if loss > HIGHER * plain else higher
        if loss > grown:
            return higher, factor
    return higher, math.inf


KEYS = ("stability_index", "stability_index_stderr", "batch_sharpness", "lambda_max", "lambda_dir", "two_over_lr")


def measured(setting: Setting, steps: int, branch: int) -> list[str]:
    """Return one row of the table."""
    adaptive = setting.optimizer in ("Adam", "AdamW", "RMSprop")
    quantity: Any = "preconditioned_lambda_max" if adaptive else "lambda_max"
    late = steps // 8
    monitors = [
        StabilityMonitor(every_n_train_steps=EVERY, window=WINDOW, probe_precision=None),
        DirectionalCurvatureMonitor(estimators=("hvp",), every_n_train_steps=EVERY),
        HessianSpectrumMonitor(quantities=(quantity,), every_n_train_steps=late),
        BatchSharpnessMonitor(every_n_train_steps=late, num_batches=64),
    ]
    rows, module = Rows([*KEYS, quantity, f"{quantity}_threshold"], steps), Learner(setting)
    state = fit(module, 0, steps, *monitors, rows)
    values = {key: [v for v in found[-WINDOW:] if math.isfinite(v)] for key, found in rows.found.items()}
    last = {key: found[-1] if found else math.nan for key, found in values.items()}
    edge = last["two_over_lr"]
    before = mean(rows.losses[-branch // 5 :])
    higher, factor = growth_factors(setting, state, branch)
    index = last["stability_index"]
    return [
        f"{setting.loss}, {setting.network}, {setting.optimizer}, η {setting.lr:g}, b {setting.batch_size}",
        f"{before:.2f}",
        f"{higher:g}",
        f"{factor:g}",
        f"{index:.2f} ± {last['stability_index_stderr']:.2f}",
        f"**{index * factor:.2f}**",
        f"{last['batch_sharpness'] / edge:.2f}",
        f"{last[quantity] / last[f'{quantity}_threshold']:.2f}",
        f"{mean(values['lambda_dir']) / edge:.2f}" if values["lambda_dir"] else "",
    ]


HEADER = """\
| setting | loss | higher from η × | grows from η × | index I | I × that | sharpness·η/2 | λ_max/edge | λ_dir·η/2 |
|---|---|---|---|---|---|---|---|---|"""


def main() -> None:
    """Measure all settings and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="two settings, few steps")
    parser.add_argument("--steps", type=int, default=1000, help="steps before the branches")
    parser.add_argument("--branch", type=int, default=200, help="steps of a branch")
    parser.add_argument("--out", type=Path, help="write the table to this file too")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    settings, steps, branch = SETTINGS, arguments.steps, arguments.branch
    if arguments.fast:
        settings, steps, branch = SETTINGS[1:5:3], 200, 20
    lines = [f"Made by `benchmarks/edge.py`: {hardware(torch.device('cpu'))}.", "", HEADER]
    print("\n".join(lines), flush=True)
    for setting in settings:
        lines.append(f"| {' | '.join(measured(setting, steps, branch))} |")
        print(lines[-1], flush=True)
    if arguments.out is not None:
        arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
