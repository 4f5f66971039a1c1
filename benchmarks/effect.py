"""Cost of putting everything back, beside a training step: ``python benchmarks/effect.py``.

Fits a module of some thousand submodules without a monitor and with one that measures each step by two forwards, and
prints medians in milliseconds: of a step, of a forward, of a measured step, and what remains of it beside the step and
two forwards. Aim: 5 % of a step. The first measured step, which checks itself, is printed apart.
"""

import statistics
import time
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_curvature import DirectionalCurvatureMonitor

STEPS = 12


class Deep(pl.LightningModule):
    """330 linear layers, each with a norm: 992 modules."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.network = nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width)) for _ in range(330)))

    def training_step(self, batch: Tensor) -> Tensor:
        """Return a loss."""
        return self.network(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class Clock(pl.Callback):
    """Times each batch with all that monitors do."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        """Start."""
        self.start = time.perf_counter()

    def on_train_batch_end(self, *args: Any) -> None:
        """Stop."""
        self.times.append(1e3 * (time.perf_counter() - self.start))


class Behind(Clock):
    """The end of the batch, behind the monitor."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def on_train_batch_start(self, *args: Any) -> None:
        """Leave the start to the other."""

    def on_train_batch_end(self, *args: Any) -> None:
        """Stop the other."""
        self.times.append(1e3 * (time.perf_counter() - self.clock.start))


def fit(width: int, x: Tensor, *monitors: pl.Callback) -> list[float]:
    """Return the times of all batches."""
    first = Clock()
    last = Behind(first)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[first, *monitors, last],
    )  # fmt: skip
    trainer.fit(Deep(width), DataLoader([x] * STEPS, batch_size=None))
    return last.times


def main() -> None:
    """Measure for three sizes of a step."""
    torch.set_num_threads(1)
    print("| width, batch | step | forward | measured step | beside step and two forwards | first measured step |")
    print("|---|---|---|---|---|---|")
    for width, batch in ((32, 32), (256, 64), (256, 512)):
        module, x, forwards = Deep(width), torch.randn(batch, width), []
        for _ in range(STEPS):
            start = time.perf_counter()
            with torch.no_grad():
                module.training_step(x)
            forwards.append(1e3 * (time.perf_counter() - start))
        forward = statistics.median(forwards)
        plain = statistics.median(fit(width, x)[1:])
        first, *later = fit(
            width, x, DirectionalCurvatureMonitor(estimators=["finite_difference"], every_n_train_steps=1)
        )
        measured = statistics.median(later)
        rest = measured - plain - 2 * forward
        print(
            f"| {width}, {batch} | {plain:.0f} ms | {forward:.0f} ms | {measured:.0f} ms | {rest:.0f} ms "
            f"({rest / plain:.0%}) | {first:.0f} ms |"
        )


if __name__ == "__main__":
    main()
