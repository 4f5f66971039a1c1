"""Digits of which half have a random label, and a Trainer without trimmings: what the benchmarks of the edge share."""

from typing import Any

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset


def noisy_digits(samples: int) -> TensorDataset:
    """Digits, half of them with a random label: a network sharpens while it learns them by heart."""
    source, g = load_digits(), torch.Generator().manual_seed(0)
    order = torch.randperm(len(source.data), generator=g)[:samples]
    x, y = torch.tensor(source.data / 8.0 - 1.0, dtype=torch.float32)[order], torch.tensor(source.target)[order]
    y[::2] = torch.randint(10, y[::2].shape, generator=g)
    return TensorDataset(x, y)


def bare_trainer(steps: int, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    """A Trainer on one CPU process that writes nothing."""
    return pl.Trainer(
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **options,
    )
