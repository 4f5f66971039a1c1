"""Tables of values: in Markdown for TensorBoard, where a curve of one point says little, and as plain text."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence

import lightning.pytorch as pl

from lightning_curvature.reporting.loggers import logged_step, tensorboards
from lightning_curvature.reporting.names import is_diagnostic, split_errors


def report_values(trainer: pl.Trainer, name: str, values: Mapping[str, float], reasons: Mapping[str, str]) -> None:
    """Write a table of values with their errors, and of the reasons of NaN, to all TensorBoard loggers."""
    writers = [logger.experiment for logger in tensorboards(trainer)] if trainer.is_global_zero else []
    for writer in writers:
        writer.add_text(name, values_table(values, reasons), logged_step(trainer))


def values_table(numbers: Mapping[str, float], reasons: Mapping[str, str]) -> str:
    """Return numbers in Markdown: first values with their errors beside them, then the other diagnostics."""
    values, errors = split_errors(numbers)
    lines = ["| key | value | standard error | why NaN |", "|---|---|---|---|"]
    for key in sorted(values, key=is_diagnostic):
        error = errors.get(key, math.nan)
        shown = "" if math.isnan(error) else f"{error:.2g}"
        lines.append(f"| `{key}` | {values[key]:.5g} | {shown} | {reasons.get(key, '')} |")
    return "\n".join(lines)


def text_table(head: Sequence[str], rows: Iterable[Sequence[str]], words: Collection[str] = ()) -> str:
    """Return rows as lines of text with columns one below the other; empty columns are left out.

    Numbers stand to the right, the first column and those whose heads are ``words`` to the left.

    Example:
        >>> print(text_table(("key", "value", "reason"), [("ias", "0.5", ""), ("gni", "12", "")]))
        key  value
        ias    0.5
        gni     12
    """
    padded = []
    for place, column in enumerate(zip(head, *rows, strict=True)):
        if place and not any(column[1:]):
            continue
        width, left = max(map(len, column)), not place or column[0] in words
        padded.append([cell.ljust(width) if left else cell.rjust(width) for cell in column])
    return "\n".join("  ".join(line).rstrip() for line in zip(*padded, strict=True))
