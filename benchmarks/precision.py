"""Compares the estimates with float64, by precision of the run: real digits, ε chosen by the monitor.

python benchmarks/precision.py --write docs/precision_directional.md
"""

from __future__ import annotations

import argparse
import copy
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers.logger import Logger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.utils.data import DataLoader

from lightning_curvature import DirectionalCurvatureMonitor

KEYS = {"kl": "lambda_kl", "finite_difference": "lambda_fd", "gauss_newton": "lambda_gn", "hvp": "lambda_dir"}
PAIR = ("kl", "finite_difference")
ALL = (*PAIR, "gauss_newton", "hvp")
CASES = [("32-true", ALL), ("32-true", ("kl",)), ("bf16-mixed", (*PAIR, "gauss_newton"))]
EVERY = 10


@dataclass(frozen=True)
class Setting:
    """One run: activation, optimizer, batch size (None: full batch), steps."""

    activation: Callable[[], nn.Module]
    optimizer: Callable[[Any], torch.optim.Optimizer]
    batch_size: int | None
    steps: int


SETTINGS = {
    "GD η=0.5, tanh, full batch": Setting(nn.Tanh, lambda p: torch.optim.SGD(p, lr=0.5), None, 300),
    "AdamW η=2e-3, GELU, full batch": Setting(nn.GELU, lambda p: torch.optim.AdamW(p, lr=2e-3), None, 400),
    "SGD η=0.1 β=0.9, tanh, batch 64": Setting(nn.Tanh, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 64, 500),
    "Adam η=1e-3, GELU, batch 64": Setting(nn.GELU, lambda p: torch.optim.Adam(p, lr=1e-3), 64, 800),
    "Adam η=1e-5, GELU, batch 64": Setting(nn.GELU, lambda p: torch.optim.Adam(p, lr=1e-5), 64, 300),
}


class Digits(pl.LightningModule):
    """MLP of three hidden layers; keeps what each measured step started from and led to."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = [(64, 48), (48, 48), (48, 48)]
        hidden = [layer for a, b in sizes for layer in (nn.Linear(a, b), setting.activation())]
        self.network = nn.Sequential(*hidden, nn.Linear(48, 10))
        self.make = setting.optimizer
        self.steps: list[tuple[dict[str, Tensor], dict[str, Tensor], Tensor, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.network(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The setting's."""
        return self.make(self.parameters())

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Note θ_t."""
        self.before = {n: p.detach().clone() for n, p in self.network.named_parameters()}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note θ_{t+1}."""
        if batch_idx % EVERY == 0:
            after = {n: p.detach().clone() for n, p in self.network.named_parameters()}
            self.steps.append((self.before, after, *batch))


class Rows(Logger):
    """Keeps what is logged."""

    name = version = "rows"

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to keep."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Keep the rows of the monitor."""
        if "curvature/headroom" in metrics:
            self.rows.append(metrics)


def truth(
    network: nn.Module, before: dict[str, Tensor], after: dict[str, Tensor], x: Tensor, y: Tensor
) -> tuple[float, float, float]:
    """gᵀd, dᵀHd, dᵀGd in float64, by automatic differentiation along the line."""
    network, x = copy.deepcopy(network).double(), x.double()
    theta = {n: p.double() for n, p in before.items()}
    d = {n: p - after[n].double() for n, p in theta.items()}
    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    loss = F.cross_entropy(functional_call(network, {n: p + t * d[n] for n, p in theta.items()}, (x,)), y)
    (slope,) = torch.autograd.grad(loss, t, create_graph=True)
    (bend,) = torch.autograd.grad(slope, t)
    z, u = jvp(lambda values: functional_call(network, values, (x,)), (theta,), (d,))
    p = z.softmax(-1)
    variance = (p * u**2).sum(-1) - (p * u).sum(-1) ** 2
    return slope.item(), bend.item(), variance.mean().item()


def batches(setting: Setting) -> list[tuple[Tensor, Tensor]]:
    """Digits in the setting's batches, shuffled anew each epoch."""
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16.0, torch.tensor(digits.target)
    if setting.batch_size is None:
        return [(x, y)] * setting.steps
    g = torch.Generator().manual_seed(0)
    parts = [
        i for _ in range(setting.steps) for i in torch.randperm(len(x), generator=g).split(setting.batch_size)[:-1]
    ]
    return [(x[i], y[i]) for i in parts[: setting.steps]]


def trained(
    module: pl.LightningModule, data: list[Any], logger: Logger, callbacks: list[pl.Callback], precision: Any
) -> None:
    """Train once over the batches."""
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        precision=precision,
        logger=logger,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, DataLoader(data, batch_size=None, shuffle=False))  # type: ignore[arg-type]


def ninth_decile(values: list[float]) -> float:
    """The value that nine in ten do not exceed."""
    return quantiles(values, n=10, method="inclusive")[-1]


def table(precision: Any, estimators: tuple[str, ...]) -> Iterator[str]:
    """Rows of one precision: distance from float64 over the measured steps with gᵀd > 0."""
    for title, setting in SETTINGS.items():
        module, rows = Digits(setting), Rows()
        monitor = DirectionalCurvatureMonitor(estimators=estimators, every_n_train_steps=EVERY)  # type: ignore[arg-type]
        trained(module, batches(setting), rows, [monitor], precision)
        truths = [truth(module.network, *step) for step in module.steps]
        for name in estimators:
            distances, ratios, lost = [], [], 0
            for row, (descent, hessian, gauss_newton) in zip(rows.rows, truths, strict=True):
                value = row[f"curvature/{KEYS[name]}"]
                if descent <= 0.0 or math.isnan(value):
                    lost += descent > 0.0
                    continue
                exact = gauss_newton if name in ("kl", "gauss_newton") else hessian
                distances.append(abs(value * row["curvature/two_over_lr"] ** -1 * 2.0 * descent / exact - 1.0))
                ratios.append(distances[-1] / row[f"curvature_diagnostics/{KEYS[name]}_error"])
            spread = "– | – | –"
            if len(distances) > 1:
                spread = f"{median(distances):.1e} | {ninth_decile(distances):.1e} | {max(distances):.1e}"
            honest = f"{ninth_decile(ratios):.1f}" if len(ratios) > 1 else "–"
            yield f"| {title} | {KEYS[name]} | {len(distances)} | {lost} | {spread} | {honest} |"


def main() -> None:
    """Print the tables; write them where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="markdown file to write")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    lines = [
        "# Precision of the directional curvature",
        "",
        "Made by `benchmarks/precision.py`: MLP (64-48-48-48-10) on scikit-learn's digits, cross-entropy, every tenth",
        f"step of each run, ε chosen by the monitor; torch {torch.__version__}, CPU.",
        "Distance: |λ/λ₆₄ − 1|, λ₆₄ by automatic differentiation in float64 along the actual step (λ_KL and λ_GN",
        "against dᵀGd, the others against dᵀHd). NaN: number of steps without a value. Last column: ninth decile of",
        "the true distance over the logged error.",
        "",
        "Through the head of a loss in bf16 (`tests/directional/test_head_precision.py`: three networks with focal,",
        "Brier, class weights and label smoothing, 24 steps each) the logged error covers the true one, with median",
        "logged over true error: bf16-mixed λ_KL 96 % (5.2), λ_GN 97 % (7.7); bf16-true λ_KL 92 % (3.6), λ_GN 98 %",
        "(5.8).",
    ]
    for precision, estimators in CASES:
        lines += ["", f"## {precision}, estimators {', '.join(estimators)}", ""]
        lines += ["| run | key | values | NaN | median | 9th decile | largest | true / logged error |"]
        lines += ["|---|---|---|---|---|---|---|---|", *table(precision, estimators)]
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.write is not None:
        arguments.write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
