"""Values of a single measurement as one text on TensorBoard, where a curve of one point says little."""

import math
from collections.abc import Mapping

import lightning.pytorch as pl

from lightning_curvature.reporting.loggers import logged_step, tensorboards
from lightning_curvature.reporting.names import is_diagnostic


def report_values(trainer: pl.Trainer, name: str, values: Mapping[str, float], reasons: Mapping[str, str]) -> None:
    """Write a table of values with their errors, and of the reasons of NaN, to all TensorBoard loggers."""
    writers = [logger.experiment for logger in tensorboards(trainer)] if trainer.is_global_zero else []
    for writer in writers:
        writer.add_text(name, values_table(values, reasons), logged_step(trainer))


def values_table(values: Mapping[str, float], reasons: Mapping[str, str]) -> str:
    """Return values in Markdown: first those with errors beside them, then the other diagnostics."""
    beside = {f"{key}_stderr" for key in values}
    first = [key for key in values if not is_diagnostic(key)]
    lines = ["| key | value | standard error | why NaN |", "|---|---|---|---|"]
    for key in (*first, *(key for key in values if key not in first and key not in beside)):
        error = values.get(f"{key}_stderr", math.nan)
        shown = "" if math.isnan(error) else f"{error:.2g}"
        lines.append(f"| `{key}` | {values[key]:.5g} | {shown} | {reasons.get(key, '')} |")
    return "\n".join(lines)
