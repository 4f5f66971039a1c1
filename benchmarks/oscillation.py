"""Tests λ_osc on full-batch runs: is λ_max at the threshold where it says so, and how soon after it got there?

Networks that no formula or rule was tuned on, five optimizers, exact λ_max of the preconditioned Hessian beside it.

    python benchmarks/oscillation.py              # some minutes on one core
    python benchmarks/oscillation.py --fast       # two runs, few steps
"""

from __future__ import annotations

import argparse
import itertools
import logging
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch
from directional import hardware
from edge import SAMPLES as DRAWN
from noisy_digits import bare_trainer, noisy_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_curvature import DirectionalCurvatureMonitor, HessianSpectrumMonitor

SAMPLES, EVERY = 256, 2
# η is half of the largest of these with which the first steps lower the loss.
RATES = [2.0**-k for k in range(-2, 14)]
TRIAL_STEPS = 150


class Mixer(nn.Module):
    """Rows of a digit mixed over places, then over features."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 24), nn.SiLU(), nn.Linear(24, 8))
        self.features = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 24), nn.SiLU(), nn.Linear(24, 8))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of (B, 64) pixels."""
        x = x.view(-1, 8, 8)
        x = x + self.places(x.transpose(1, 2)).transpose(1, 2)
        return self.head((x + self.features(x)).flatten(1))


class Recurrent(nn.Module):
    """A plain recurrent network over the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.head = nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of (B, 64) pixels."""
        state = x.new_zeros(len(x), 32)
        for row in x.view(-1, 8, 8).unbind(1):
            state = torch.tanh(self.first(row) + self.again(state))
        return self.head(state)


def softplus() -> nn.Module:
    """A convolution along the rows, with softplus."""
    return nn.Sequential(
        nn.Unflatten(1, (8, 8)), nn.Conv1d(8, 24, 3, padding=1), nn.Softplus(), nn.Flatten(), nn.Linear(192, 10)
    )


def cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    """Of logits."""
    return nn.functional.cross_entropy(z, y)


def squared_error(z: Tensor, y: Tensor) -> Tensor:
    """To one-hot labels."""
    return (z - nn.functional.one_hot(y, 10)).square().sum(-1).mean()


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[Tensor, Tensor], Tensor]]] = {
    "mixer, SiLU": (Mixer, cross_entropy),
    "recurrent, tanh": (Recurrent, squared_error),
    "convolution, softplus": (softplus, cross_entropy),
    "MLP, ELU": (lambda: nn.Sequential(nn.Linear(64, 48), nn.ELU(), nn.Linear(48, 10)), squared_error),
    "MLP, ReLU": (lambda: nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10)), cross_entropy),
}
OPTIMIZERS: dict[str, Callable[[Any, float], torch.optim.Optimizer]] = {
    "gradient descent": lambda p, lr: torch.optim.SGD(p, lr=lr),
    "heavy ball 0.9": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9),
    "Nesterov 0.9": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9, nesterov=True),
    "Adam": lambda p, lr: torch.optim.Adam(p, lr=lr),
    "RMSprop": lambda p, lr: torch.optim.RMSprop(p, lr=lr),
}


class Learner(pl.LightningModule):
    """A network on one batch."""

    def __init__(self, network: str, optimizer: str, lr: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        make, self.loss = NETWORKS[network]
        self.network, self.make, self.rate = make(), OPTIMIZERS[optimizer], lr

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """The network's loss."""
        return self.loss(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """With its rate."""
        return self.make(self.parameters(), self.rate)


@dataclass
class Moment:
    """One measured step: eigenvalue and λ_osc as shares of the threshold, cosine, λ_dir·η/2 and loss."""

    step: int
    eigenvalue: float
    ratio: float
    cosine: float
    along: float
    loss: float


@dataclass
class Notes(pl.Callback):
    """Takes down the moments of a run."""

    directional: Any
    moments: list[Moment] = field(default_factory=list)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, *_: Any) -> None:
        """After the monitors."""
        step = trainer.global_step - 1
        if step % EVERY:
            return
        values = self.directional.result.values()
        room = float(trainer.callback_metrics.get("curvature/stability_headroom", math.nan))
        self.moments.append(
            Moment(
                step,
                1.0 / room,
                values["oscillation_ratio"],
                values["oscillation_cosine"],
                1.0 / values["headroom"] if values["headroom"] else math.nan,
                float(outputs["loss"]),
            )
        )


def rate(network: str, optimizer: str, data: TensorDataset) -> float:
    """Return the learning rate of a run."""
    for lr in RATES[8:] if optimizer in ("Adam", "RMSprop") else RATES:
        module = Learner(network, optimizer, lr)
        steps, losses = module.configure_optimizers(), []
        for _ in range(TRIAL_STEPS):
            loss = module.training_step(data.tensors, 0)
            steps.zero_grad()
            loss.backward()
            steps.step()
            losses.append(loss.item())
        late = losses[-TRIAL_STEPS // 3 :]
        if math.isfinite(late[-1]) and median(late) < 0.8 * losses[0] and max(late) < 1.2 * losses[0]:
            return lr / 2.0
    raise RuntimeError(f"no learning rate for {network}, {optimizer}")


def run(network: str, optimizer: str, data: TensorDataset, steps: int) -> tuple[float, list[Moment]]:
    """Train, and return η and the moments."""
    lr = rate(network, optimizer, data)
    quantity: Any = "preconditioned_lambda_max" if optimizer in ("Adam", "RMSprop") else "lambda_max"
    directional = DirectionalCurvatureMonitor(estimators=("oscillation", "hvp"), every_n_train_steps=EVERY)
    spectrum = HessianSpectrumMonitor(quantities=(quantity,), every_n_train_steps=EVERY, probe_precision=None)
    notes = Notes(directional)
    trainer = bare_trainer(steps, directional, spectrum, notes)
    trainer.fit(Learner(network, optimizer, lr), DataLoader(data, batch_size=len(data)))
    return lr, notes.moments


def delay(moments: Sequence[Moment], start: int, seen: Callable[[Moment], bool]) -> float:
    """Return the steps from a moment to the first at which something is seen."""
    return next((m.step - moments[start].step for m in moments[start:] if seen(m)), math.inf)


def sentinel(values: Sequence[float]) -> str:
    """Quantiles of delays, infinite ones among them."""
    ordered = sorted(values)
    picked = [ordered[round(q * (len(ordered) - 1))] for q in (0.1, 0.5, 0.9)]
    return f"{picked[1]:g} [{picked[0]:g}, {picked[2]:g}]"


def quantiles(values: Sequence[float]) -> str:
    """Median with the outer tenths."""
    ordered = sorted(values)
    low, high = (ordered[round(q * (len(ordered) - 1))] for q in (0.1, 0.9))
    return f"{median(ordered):.2f} [{low:.2f}, {high:.2f}]"


def bands(runs: dict[str, list[Moment]]) -> list[str]:
    """Return the table of cosines: what λ_max is where they are below or above a limit."""
    lines = ["| runs | cosine | measurements | λ_osc/λ_max | λ_max ≥ 0.9 of its threshold |", "|---|---|---|---|---|"]
    kinds = {"smooth": lambda name: "ReLU" not in name, "ReLU": lambda name: "ReLU" in name}
    for kind, chosen in kinds.items():
        every = [m for name, moments in runs.items() if chosen(name) for m in moments if math.isfinite(m.eigenvalue)]
        for low, high in itertools.pairwise((-1.01, -0.97, -0.9, -0.7, 1.01)):
            some = [m for m in every if low <= m.cosine < high]
            if not some:
                continue
            ratios = [m.ratio / m.eigenvalue for m in some if math.isfinite(m.ratio)]
            share = sum(m.eigenvalue >= 0.9 for m in some) / len(some)
            span = f"{max(low, -1):g} to {min(high, 1):g}"
            lines.append(f"| {kind} | {span} | {len(some)} | {quantiles(ratios) if ratios else ''} | {share:.0%} |")
    return lines


def false_alarms(runs: dict[str, list[Moment]]) -> list[str]:
    """Return the table of what λ_max is where a detector says that the run is at the edge."""
    lines = [
        "| detector | measurements at which it says so | λ_max ≥ 0.9 of its threshold | ≥ 0.5 |",
        "|---|---|---|---|",
    ]
    every = [m for moments in runs.values() for m in moments if math.isfinite(m.eigenvalue)]
    for name, says in {
        "λ_osc ≥ 0.9 of its threshold": lambda m: m.ratio >= 0.9,
        "cosine below −0.9": lambda m: m.cosine < -0.9,
        "λ_dir·η/2 ≥ 0.9, headroom ≤ 1.1": lambda m: m.along >= 0.9,
    }.items():
        some = [m.eigenvalue for m in every if says(m)]
        shares = [sum(value >= limit for value in some) / len(some) if some else math.nan for limit in (0.9, 0.5)]
        lines.append(f"| {name} | {len(some)} | {shares[0]:.0%} | {shares[1]:.0%} |")
    return lines


def main() -> None:
    """Run all and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="two runs, few steps")
    parser.add_argument("--steps", type=int, default=500, help="steps of a run")
    parser.add_argument("--out", type=Path, help="write the tables to this file too")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    data = TensorDataset(*(t[:SAMPLES] for t in noisy_digits(DRAWN).tensors))
    names = list(itertools.product(NETWORKS, OPTIMIZERS))
    steps = 60 if arguments.fast else arguments.steps
    runs, onsets = {}, list[tuple[float, ...]]()
    lines = [f"Made by `benchmarks/oscillation.py`: {hardware(torch.device('cpu'))}.", ""]
    lines += ["| run | η | largest λ_max/threshold | onset at step | λ_osc after | λ_dir after | loss rises after |"]
    lines += ["|---|---|---|---|---|---|---|"]
    print("\n".join(lines), flush=True)
    for network, optimizer in names[::7] if arguments.fast else names:
        lr, moments = run(network, optimizer, data, steps)
        name = f"{network}, {optimizer}"
        runs[name] = moments
        onset = next((k for k, m in enumerate(moments) if m.step >= 8 and m.eigenvalue >= 1.0), None)
        cells = ["", "", "", ""]
        if onset is not None:
            least = min(m.loss for m in moments[: onset + 1])
            delays = (
                delay(moments, onset, lambda m: m.ratio >= 0.9),
                delay(moments, onset, lambda m: m.along >= 0.9),
                delay(moments, onset, lambda m, least=least: m.loss > 1.2 * least),  # type: ignore[misc]
            )
            onsets.append(delays)
            cells = [f"{moments[onset].step}", *(f"{d:g}" for d in delays)]
        top = max((m.eigenvalue for m in moments if m.step >= 8 and math.isfinite(m.eigenvalue)), default=math.nan)
        lines.append(f"| {name} | {lr:g} | {top:.2f} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    rest = ["", *bands(runs), "", *false_alarms(runs), ""]
    if onsets:
        words = [sentinel(one) for one in zip(*onsets, strict=True)]
        rest.append(
            f"Steps from the onset, λ_max at its threshold, over {len(onsets)} runs, median [outer tenths]: λ_osc "
            f"{words[0]}, λ_dir {words[1]}, loss a fifth above its least {words[2]}."
        )
    print("\n".join(rest), flush=True)
    if arguments.out is not None:
        arguments.out.write_text("\n".join([*lines, *rest]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
