"""The picture of values by module: bars."""

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl

from lightning_curvature.reporting.loggers import logged_step, tensorboards, warn
from lightning_curvature.reporting.pictures import new_figure, picture_of

# More names than this cannot be read: those with the largest values are drawn.
_DRAWN = 30
_ERROR = "_stderr"


def report_bars(trainer: pl.Trainer, key: str, names: Sequence[str], columns: Mapping[str, Sequence[float]]) -> None:
    """Write a picture of values by name to all TensorBoard loggers, where there are any, with matplotlib."""
    writers = [logger.experiment for logger in tensorboards(trainer)]
    if not writers or not trainer.is_global_zero or not columns:
        return
    step = logged_step(trainer)
    figure = bars(f"{key} at step {step}", names, columns)
    if figure is None:
        warn("values by module come without a picture: install matplotlib to have one beside the scalars.")
        return
    picture = picture_of(figure)
    for writer in writers:
        writer.add_image(f"{key}/picture", picture, step, dataformats="HWC")


def bars(title: str, names: Sequence[str], columns: Mapping[str, Sequence[float]]) -> Any | None:
    """Return a figure with the bars of each column side by side, or None without matplotlib.

    Columns whose key ends in ``_stderr`` are the error bars of the others.
    """
    drawn = {key: column for key, column in columns.items() if not key.endswith(_ERROR)}
    largest = {key: max(map(abs, column)) or 1.0 for key, column in drawn.items()}
    size = [max(abs(column[i]) / largest[key] for key, column in drawn.items()) for i in range(len(names))]
    chosen = sorted(sorted(range(len(names)), key=lambda i: -size[i])[:_DRAWN])
    figure = new_figure(figsize=(1.6 + 2.8 * len(drawn), 1.2 + 0.24 * len(chosen)), dpi=100)
    if figure is None:
        return None
    all_axes = figure.subplots(1, len(drawn), sharey=True, squeeze=False)[0]
    for axes, (key, column) in zip(all_axes, drawn.items(), strict=True):
        errors = columns.get(f"{key}{_ERROR}")
        spread = None if errors is None else [errors[i] for i in chosen]
        axes.barh([names[i] for i in chosen], [column[i] for i in chosen], xerr=spread, height=0.7, ecolor="0.3")
        axes.axvline(0.0, color="0.3", linewidth=0.8)
        axes.set_title(key, fontsize=9)
    all_axes[0].invert_yaxis()
    left_out = f" ({len(chosen)} of {len(names)} modules)" if len(chosen) < len(names) else ""
    figure.suptitle(f"{title}{left_out}", fontsize=10)
    return figure
