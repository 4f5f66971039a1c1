"""Logged runs without a fit: curves by name, and files as CSVLogger writes them."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_curvature.report.reading import Curve, Run

# A value for each step, from 0 on.
Curves = Mapping[str, Sequence[float]]


def run_of(curves: Curves, name: str = "run", **hparams: Any) -> Run:
    """A run with its curves, by full name."""
    read = {key: Curve(np.arange(len(values)), np.array(values, dtype=float)) for key, values in curves.items()}
    return Run(name, Path(name), read, {}, hparams)


def write_csv(folder: Path, curves: Curves, every: int = 1, hparams: str = "") -> Path:
    """Write curves as CSVLogger does: one row a step, a column a name."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metrics.csv").open("w", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened)
        writer.writerow(["epoch", "step", *curves])
        for row in range(max(map(len, curves.values()))):
            cells = [values[row] if row < len(values) else "" for values in curves.values()]
            writer.writerow([0, row * every, *cells])
    if hparams:
        (folder / "hparams.yaml").write_text(hparams, encoding="utf-8")
    return folder


def everything(steps: int = 12) -> dict[str, list[float]]:
    """Values of every monitor that a report has a section for."""
    t = range(steps)
    one = {
        "lambda_max": [0.2 * (i + 1) for i in t],
        "lambda_2": [0.1 * (i + 1) for i in t],
        "lambda_min": [-0.1] * steps,
        "hessian_trace": [2.0 + i for i in t],
        "lambda_max_threshold": [2.0] * steps,
        "lambda_dir": [0.15 * i for i in t],
        "two_over_lr": [2.0] * steps,
        "batch_sharpness": [0.1 * i for i in t],
        "stability_index": [math.nan, *(0.08 * i for i in t[1:])],
        "regime": [0.0, 0.0, *[2.0] * (steps - 4), 5.0, 5.0],
        "regime_alarm": [0.0] * (steps - 1) + [1.0],
        "edge_ratio": [0.1 * (i + 1) for i in t],
    }
    beside = {"lambda_max_error": [0.01] * steps, "stability_index_stderr": [0.02] * steps}
    shares = {"lambda_max": [0.1 * (i + 1) for i in t], "edge": [1.0] * steps}
    modules = {f"lambda_max_share/layer{k}": [0.5 + 0.01 * i * (-1) ** k for i in t] for k in range(2)}
    return {
        "train_loss": [1.0 / (i + 1) for i in t],
        "val_loss": [1.1 / (i + 1) for i in t],
        **{f"curvature/{key}": values for key, values in one.items()},
        **{f"curvature_diagnostics/{key}": values for key, values in beside.items()},
        **{f"curvature_over_edge/{key}": values for key, values in shares.items()},
        **{f"curvature_by_module/{key}": values for key, values in modules.items()},
    }
