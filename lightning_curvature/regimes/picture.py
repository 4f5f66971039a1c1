"""The picture of a run: loss and edge ratio over its steps, each stretch in the colour of its regime."""

import itertools
from typing import Any

import lightning.pytorch as pl

from lightning_curvature.functional.regime import REGIMES
from lightning_curvature.regimes.result import History
from lightning_curvature.reporting.loggers import logged_step, tensorboards, warn
from lightning_curvature.reporting.pictures import new_figure, picture_of

_COLOURS = ("white", "0.85", "tab:green", "tab:olive", "tab:cyan", "tab:orange", "tab:red", "black")


def report_history(trainer: pl.Trainer, key: str, history: History) -> None:
    """Write the picture of a run so far to all TensorBoard loggers, where there are any, with matplotlib."""
    writers = [logger.experiment for logger in tensorboards(trainer)]
    if not writers or not trainer.is_global_zero or not history.steps:
        return
    figure = stretches(key, history)
    if figure is None:
        warn("regimes come without a picture: install matplotlib to have one beside the scalars.")
        return
    picture = picture_of(figure)
    for writer in writers:
        writer.add_image(key, picture, logged_step(trainer), dataformats="HWC")


def stretches(title: str, history: History) -> Any | None:
    """Return the figure, or None without matplotlib."""
    figure = new_figure(figsize=(9.0, 4.5), dpi=100)
    if figure is None:
        return None
    upper, lower = figure.subplots(2, 1, sharex=True)
    upper.plot(history.steps, history.losses, color="black", linewidth=1.0)
    upper.set_yscale("symlog" if min(history.losses) <= 0.0 else "log")
    upper.set_ylabel("loss")
    lower.plot(history.steps, history.ratios, ".", color="black", markersize=3.0)
    lower.axhline(1.0, color="0.3", linestyle=":")
    lower.set_ylabel("edge ratio")
    lower.set_xlabel("step")
    runs = [list(run) for _, run in itertools.groupby(range(len(history.steps)), lambda i: history.regimes[i])]
    ends = [history.steps[run[0]] for run in runs[1:]] + [history.steps[-1] + 1]
    drawn: dict[int, Any] = {}
    for run, end in zip(runs, ends, strict=True):
        regime = history.regimes[run[0]]
        for axes in (upper, lower):
            drawn[regime] = axes.axvspan(history.steps[run[0]], end, color=_COLOURS[regime], alpha=0.3, linewidth=0.0)
    for axes, alarm in itertools.product((upper, lower), history.alarms):
        axes.axvline(alarm, color="tab:red", linewidth=0.8)
    figure.legend(drawn.values(), [REGIMES[regime] for regime in drawn], loc="outside right", fontsize=8)
    figure.suptitle(f"{title} up to step {history.steps[-1]}; red lines are alarms", fontsize=10)
    return figure
